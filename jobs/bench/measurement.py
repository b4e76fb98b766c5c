"""One timed run of a workload, by whichever engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """`seconds` is from the first request given to the last token received, without loading and compiling.

    `token_ids` are the new tokens of each request's samples, in the workload's order; `details` is what the
    engine has to say about the run (step times, batch size, ...), plain values only.
    """

    engine: str
    seconds: float
    token_ids: tuple[tuple[int, ...], ...]
    details: dict[str, Any] = field(default_factory=dict)


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the maximum, by nearest rank; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in ranks.items()}
