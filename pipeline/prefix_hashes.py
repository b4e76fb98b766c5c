"""Prefixes as numbers: a hash for every `UNIT` tokens of a prompt, each covering all tokens before it.

What two prompts have in common is where their hashes agree, at eight bytes a unit instead of the tokens. A
collision (one in 2**64) would cost a little speed and can never change a result: only orders and hints are
made from these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNIT = 8
"""Tokens between two hashes: what prompts have in common is known to so many tokens."""

_NUM_PROBES = 4


class PrefixHasher:
    """Hashes prompts. The same tokens give the same hashes in every process."""

    def __init__(self) -> None:
        self._weights = _mixed(np.arange(1, 1025, dtype=np.uint64)) | np.uint64(1)

    def hashes(self, token_ids: Sequence[int]) -> np.ndarray:
        """u64[ceil(len / UNIT)]: after each whole unit, and after the last token if it ends inside one."""
        num_tokens = len(token_ids)
        if num_tokens > len(self._weights):
            size = 1 << num_tokens.bit_length()
            self._weights = _mixed(np.arange(1, size + 1, dtype=np.uint64)) | np.uint64(1)
        values = _mixed(np.array(token_ids, dtype=np.uint64) + np.uint64(1)) * self._weights[:num_tokens]
        sums = np.cumsum(values, dtype=np.uint64)
        ends = np.arange(UNIT, num_tokens + UNIT, UNIT)
        ends[-1] = num_tokens
        # Zero is how an empty place of `SeenPrefixes` looks.
        return np.maximum(_mixed(sums[ends - 1]), np.uint64(1))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Well-mixed numbers of 64 bits (splitmix64, Steele, Lea and Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SeenPrefixes:
    """The prefixes of everything planned so far, in a table of fixed size.

    max_prefixes: places in the table, a power of two, eight bytes each. A prefix that finds no place is
        forgotten, and `is_exact` says so: what is found then is a lower bound.
    """

    def __init__(self, max_prefixes: int = 2**22):
        if max_prefixes < 2 or max_prefixes & (max_prefixes - 1):
            raise ValueError(f"a table has a power of two places, not {max_prefixes}")
        self._table = np.zeros(max_prefixes, dtype=np.uint64)
        self._mask = np.uint64(max_prefixes - 1)
        self.is_exact = True

    def num_known(self, hashes: np.ndarray) -> int:
        """How many leading ones of a prompt's hashes have been added before."""
        known = np.zeros(len(hashes), dtype=bool)
        for probe in range(_NUM_PROBES):
            known |= self._table[self._places(hashes, probe)] == hashes
        return len(known) if known.all() else int(np.argmin(known))

    def add(self, hashes: np.ndarray) -> None:
        """Remember these, of any number of prompts."""
        left = hashes
        for probe in range(_NUM_PROBES):
            places = self._places(left, probe)
            empty = self._table[places] == 0
            self._table[places[empty]] = left[empty]
            left = left[self._table[places] != left]
        self.is_exact = self.is_exact and len(left) == 0

    def _places(self, hashes: np.ndarray, probe: int) -> np.ndarray:
        return ((hashes >> np.uint64(16 * probe % 64)) & self._mask).astype(np.int64)
