"""One run spread over a Ray cluster: `python -m jobs.ray`."""
