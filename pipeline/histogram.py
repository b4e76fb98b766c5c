"""A histogram with fixed boundaries: two add up exactly, so percentiles survive a merge and a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BUCKETS_PER_DECADE = 32  # neighbouring boundaries are 7.5 % apart, so a percentile is off by 3.7 % at most
SMALLEST = 1e-6


@dataclass(slots=True)
class Histogram:
    """Counts of non-negative values in logarithmic buckets, with their exact sum, least and greatest.

    Bucket `b` holds values in [SMALLEST * 10^(b/32), SMALLEST * 10^((b+1)/32)); everything below
    SMALLEST is in bucket 0.
    """

    counts: dict[int, int] = field(default_factory=dict)
    total: float = 0.0
    least: float | None = None
    greatest: float | None = None

    def add(self, value: float, times: int = 1) -> None:
        """Count `value` `times` times."""
        if times == 0:
            return
        bucket = _bucket(value)
        self.counts[bucket] = self.counts.get(bucket, 0) + times
        self.total += value * times
        self.least = value if self.least is None else min(self.least, value)
        self.greatest = value if self.greatest is None else max(self.greatest, value)

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.counts else None

    def quantile(self, q: float) -> float | None:
        """The value that a share `q` of what was added does not exceed (nearest rank), None when empty."""
        if not self.counts or self.least is None or self.greatest is None:
            return None
        rank = max(1, math.ceil(q * self.count))
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                middle = SMALLEST * 10 ** ((bucket + 0.5) / BUCKETS_PER_DECADE)
                return min(max(middle, self.least), self.greatest)
        raise AssertionError("a histogram's counts do not add up")

    def merge(self, other: Histogram) -> None:
        """Add everything `other` has counted."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.total += other.total
        for value in (other.least, other.greatest):
            if value is not None:
                self.least = value if self.least is None else min(self.least, value)
                self.greatest = value if self.greatest is None else max(self.greatest, value)

    def summary(self) -> dict[str, Any]:
        """Count, mean, extremes and the usual percentiles, for people."""
        return {
            "count": self.count,
            "mean": self.mean,
            "min": self.least,
            "p50": self.quantile(0.50),
            "p90": self.quantile(0.90),
            "p95": self.quantile(0.95),
            "p99": self.quantile(0.99),
            "max": self.greatest,
        }

    def to_json(self) -> dict[str, Any]:
        counts = {str(bucket): self.counts[bucket] for bucket in sorted(self.counts)}
        return {"counts": counts, "total": self.total, "least": self.least, "greatest": self.greatest}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Histogram:
        counts = {int(bucket): int(count) for bucket, count in values["counts"].items()}
        return cls(counts, values["total"], values["least"], values["greatest"])


def _bucket(value: float) -> int:
    if value < 0 or math.isnan(value):
        raise ValueError(f"a histogram holds values from 0 up, not {value}")
    return 0 if value <= SMALLEST else math.floor(math.log10(value / SMALLEST) * BUCKETS_PER_DECADE)
