"""One run of a schedule at a time: a lease on the folder that all its dates lie in.

    _schedule/claims/00000/…  _schedule/heartbeats/00000/…     as a shard's (pipeline/lease.py)
    _schedule/cancel/<epoch>.json                              created once: the holder is asked to end

The lease is made by exclusive create, so it works on disks and in buckets, and it outlives no holder: one
that died here is followed at once, one that died elsewhere after two minutes without a heartbeat.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.errors import TidemillError
from pipeline.claims import Heartbeat, epoch_key, read_claim, read_claims, read_heartbeat
from pipeline.commits import publish_record, retrying
from pipeline.fingerprint import canonical_json
from pipeline.lease import Lease
from pipeline.lease_book import HEARTBEAT_S, TAKEOVER_S, LeaseBook
from pipeline.process_identity import ProcessIdentity
from pipeline.signals import StopRequest
from pipeline.storage import Storage

STATE = "_schedule"
_ONLY = 0  # the one thing to lease


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lock. `date` is None for a moment, before it says; the nonce changes while it lives."""

    epoch: int
    owner: ProcessIdentity
    date: str | None
    nonce: str

    def __str__(self) -> str:
        return f"process {self.owner.pid} on {self.owner.host}"


class RunLock:
    """The lock of the schedule whose dates lie in `storage`; use it as a context to give it back."""

    def __init__(
        self,
        storage: Storage,
        *,
        owner: ProcessIdentity | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        takeover_s: float = TAKEOVER_S,
        poll_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._storage = storage
        self._poll_s = poll_s
        self._leases = LeaseBook(
            storage,
            STATE,
            owner=owner or ProcessIdentity.of_this_process(),
            heartbeat_s=heartbeat_s,
            takeover_s=takeover_s,
            clock=clock,
        )
        self._lease: Lease | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._leases.close()

    def take(self) -> bool:
        """Whether the lock is ours now. Ask again every few seconds: only so is a dead holder told from a
        live one.
        """
        self._lease = self._leases.claim(_ONLY)
        return self._lease is not None

    def holder(self) -> Holder | None:
        """None when nobody holds it."""
        claims = read_claims(self._storage, STATE, _ONLY)
        latest = claims.latest
        if not latest or claims.epochs[latest]:
            return None
        key = epoch_key(latest)
        owner = read_claim(self._storage, STATE, _ONLY, key).owner
        told = read_heartbeat(self._storage, STATE, _ONLY, key) or Heartbeat("", frozenset(), None)
        return Holder(latest, owner, next(iter(told.in_flight), None), told.nonce)

    def ask_to_end(self, holder: Holder, why: str) -> None:
        """Ask the holder to drain; it looks every few seconds."""
        publish_record(self._storage, _cancel_path(holder.epoch), canonical_json({"why": why}))

    @contextmanager
    def running(self, date: str, stop: StopRequest) -> Iterator[None]:
        """Say that `date` runs; ask `stop` for a drain when somebody asks for the lock or has taken it."""
        lease = self._lease
        assert lease is not None, "take the lock first"
        lease.set_in_flight([date])
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(self._poll_s):
                cause = self._why_end(lease)
                if cause is not None:
                    stop.ask(cause)
                    return

        thread = threading.Thread(target=watch, name="tidemill-schedule", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _why_end(self, lease: Lease) -> str | None:
        if lease.is_lost:
            return "another start of the schedule, which took this one for dead"
        try:
            asked = retrying(lambda: self._storage.read(_cancel_path(lease.epoch)))
        except TidemillError:
            return None  # the run meets the same fault by itself
        return None if asked is None else "a newer date of the schedule"


def _cancel_path(epoch: int) -> str:
    return f"{STATE}/cancel/{epoch:06d}.json"
