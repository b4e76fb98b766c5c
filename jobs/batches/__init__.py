"""Batches of the server as runs of the pipeline: each has a folder with its ledger, on the server's own
engines."""
