"""In which order a worker takes shards, so that many workers seldom want the same one.

    3 workers, shards 0 … 8:  worker 0 takes 0 1 2, worker 1 takes 3 4 5, worker 2 takes 6 7 8;
    then what is left of the others' parts, each from its end.

A part is a run of neighbours: shards that were written together begin alike more often than not, so a
worker's prefix cache holds the templates of the shard before. The order balances nothing by itself: a shard
belongs to whoever leases it first, and who is done early takes from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """index: which of several workers this is, from 0. count: how many were started with the same command.

    They only say where each begins: any number may be started, with any index, also later.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"worker.count={self.count}: must be at least 1")
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"worker.index={self.index}: workers count from 0, so with worker.count={self.count} it "
                f"must be from 0 to {self.count - 1}"
            )


def order_of(shards: Sequence[int], worker: WorkerSettings) -> list[int]:
    """`shards` (in order) in the order that `worker` asks for them; each once."""
    bounds = [len(shards) * part // worker.count for part in range(worker.count + 1)]
    parts = [list(shards[start:stop]) for start, stop in pairwise(bounds)]
    ordered = parts[worker.index]
    for step in range(1, worker.count):
        ordered = ordered + parts[(worker.index + step) % worker.count][::-1]
    return ordered
