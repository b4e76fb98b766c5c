"""Rows that ask for the same generation, counted by what they ask and not by how a run went.

Which of them the engine answers with one generation depends on which are unfinished at the same moment. The
counts of a commit record and of the manifest must not: a run that is killed and resumed has those of an
uninterrupted one. So every row that could share has a key made of its tokens and its effective sampling, a
chunk's commit record keeps the keys, and a row counts as a duplicate when an earlier one of the chunk, of the
shard once that is finished, has the same key. What the engine really fanned out is in metrics/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from engine.duplicates import shared_sampling
from engine.sampling_params import SamplingParams
from pipeline.fingerprint import canonical_json
from pipeline.rows import Prompt

KEY_BYTES = 8
"""Of a million different rows two have the same key with a chance of 3e-8."""


def duplicate_key(prompt: Prompt) -> bytes:
    """What a row has in common with its exact duplicates; empty for one whose draws are its own."""
    sampling = shared_sampling(prompt.sampling)
    if sampling is None:
        return b""
    tokens = np.asarray(prompt.token_ids, "<u4").tobytes()
    return hashlib.blake2b(tokens, digest_size=KEY_BYTES, key=_digest(sampling)).digest()


@lru_cache(maxsize=256)
def _digest(sampling: SamplingParams) -> bytes:
    return hashlib.blake2b(canonical_json(sampling.as_dict()), digest_size=32).digest()


def num_duplicates(keys: Iterable[bytes]) -> int:
    """How many rows repeat an earlier one, from their keys joined together, in any number of pieces."""
    found = np.frombuffer(b"".join(keys), np.uint64)
    return len(found) - len(np.unique(found))
