"""The baseline: two workloads on the real model, timed, and set against transformers on the same ids."""
