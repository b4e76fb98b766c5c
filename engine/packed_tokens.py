"""Token ids as bytes, four each: what is compared, hashed and kept by the thousand is small and in one piece.

A tuple of a page's tokens is eight times as large and its numbers lie about in memory, so that to compare two
is to wait for memory. Byte order is the machine's: the bytes never leave the process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

NUM_BYTES = 4
"""Of a token."""


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    return array("I", token_ids).tobytes()


def unpack_tokens(tokens: bytes) -> np.ndarray:
    """i32[number of tokens], read only."""
    return np.frombuffer(tokens, np.int32)


def max_token(tokens: bytes) -> int:
    """The largest of at least one."""
    return np.frombuffer(tokens, np.uint32).max().item()


def num_common_tokens(one: bytes, other: bytes) -> int:
    """How many packed tokens both begin with."""
    low, high = 0, min(len(one), len(other)) // NUM_BYTES
    if one[: high * NUM_BYTES] == other[: high * NUM_BYTES]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * NUM_BYTES : middle * NUM_BYTES] == other[low * NUM_BYTES : middle * NUM_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
