"""Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): alike goes to alike, but
never too much.

Names and keys are points on a ring; a key belongs to the first name behind it. When a name goes, only its
keys move. A name whose load is at its bound passes on to the next.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Mapping

POINTS_PER_NAME = 64


class HashRing:
    """The order in which names are asked to take a key; the same in every process."""

    def __init__(self, names: Iterable[str]):
        points = sorted(
            (_point(f"{name}\0{number}".encode()), name)
            for name in names
            for number in range(POINTS_PER_NAME)
        )
        self._points = [point for point, _ in points]
        self._names = [name for _, name in points]

    def order(self, key: bytes) -> list[str]:
        """All names, the one that `key` belongs to first."""
        start = bisect.bisect_right(self._points, _point(key))
        return list(dict.fromkeys(self._names[start:] + self._names[:start]))


def load_bound(loads: Iterable[int], load_factor: float) -> int:
    """The most that each may have, when one more comes: `load_factor` times the average, rounded up."""
    values = list(loads)
    return math.ceil(load_factor * (sum(values) + 1) / len(values))


def by_prefix(order: Iterable[str], loads: Mapping[str, int], load_factor: float) -> list[str]:
    """The names of `loads` as they come in `order`, those at their bound last, the least loaded of them
    first."""
    bound = load_bound(loads.values(), load_factor)
    names = [name for name in order if name in loads]
    free = [name for name in names if loads[name] < bound]
    return free + sorted((name for name in names if loads[name] >= bound), key=lambda name: loads[name])


def by_load(loads: Mapping[str, int]) -> list[str]:
    """The names of `loads`, the least loaded first."""
    return sorted(loads, key=lambda name: loads[name])


def _point(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
