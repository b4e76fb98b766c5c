"""Leases: one worker at a time on a shard, and what its heartbeats tell after it died."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Who holds a lease, precisely enough to know on the same machine that it is gone."""

    host: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    started: str | None


@dataclass(frozen=True, slots=True)
class Suspects:
    isolate: frozenset[str]  # run these with nothing else in flight
    quarantined: frozenset[str]  # reject these with reason `quarantined`


class Lease:
    shard: int
    epoch: int

    @property
    def is_lost(self) -> bool:
        """Somebody took the shard over: stop working on it (a commit would merely lose)."""
        raise NotImplementedError

    def set_in_flight(self, row_ids: Iterable[str], progress: int = 0) -> None:
        """Say which rows the engine is about to run, before it runs them: written out at once."""
        raise NotImplementedError

    def release(self) -> None:
        """Give the shard back, so that the next claim need not wait; safe to call twice."""
        raise NotImplementedError
