"""A histogram with fixed buckets in which a value can count several times.

(prometheus-client's own takes one value at a time: for the time between tokens that would be a call a token.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class HistogramCounts(NamedTuple):
    """What a histogram holds at one moment."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets, themselves included; one more bucket has none."""
    counts: tuple[int, ...]
    """Of each bucket by itself, len(bounds) + 1 of them."""
    total: float
    """Sum of all values."""

    @property
    def count(self) -> int:
        return sum(self.counts)


class Histogram:
    """Not thread-safe: its owner locks."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def read(self) -> HistogramCounts:
        return HistogramCounts(self._bounds, tuple(self._counts), self._total)
