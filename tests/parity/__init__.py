"""What transformers computes with torch, stored under tests/data, and the same comparison live.

`python -m tests.parity --write` makes the stored values, `--live` compares with torch without storing
anything; both need the extra `parity`. `make test` reads the stored values only and needs no torch.
"""
