"""Leases: one worker at a time on a shard, so that work is not done twice. Safety never rests on them.

    claims/<shard>/<epoch>.json       created once: who took the shard; a take-over creates the next epoch
    claims/<shard>/<epoch>.released   created once: its holder gave the shard back
    heartbeats/<shard>/<epoch>.json   overwritten by the holder: a nonce, and the rows in flight

A holder is dead when it certainly ended on this machine, or when its nonce has not changed for
`takeover_s` of the observer's own watching. No clocks of two machines are compared.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from engine.errors import TidemillError
from pipeline.commits import parse_record, publish_record, retrying
from pipeline.fingerprint import canonical_json
from pipeline.process_identity import ProcessIdentity
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

HEARTBEAT_S = 20.0
TAKEOVER_S = 120.0


@dataclass(frozen=True, slots=True)
class Claim:
    """One epoch of a shard."""

    shard: int
    epoch: int
    owner: ProcessIdentity
    is_released: bool


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last words of an epoch. `alone_progress`: set when the only row in flight ran alone, its steps
    so far.
    """

    nonce: str
    in_flight: frozenset[str]
    alone_progress: int | None


@dataclass(frozen=True, slots=True)
class Suspects:
    """Row ids implicated in the deaths of a shard's former workers (see pipeline/suspects.py)."""

    isolate: frozenset[str]  # run these with nothing else in flight
    quarantined: frozenset[str]  # reject these with reason `quarantined`


def claims_folder(state: str, shard: int) -> str:
    return f"{state}/claims/{shard:05d}"


def _claim_path(state: str, shard: int, epoch: int) -> str:
    return f"{claims_folder(state, shard)}/{epoch:06d}.json"


def _released_path(state: str, shard: int, epoch: int) -> str:
    return f"{claims_folder(state, shard)}/{epoch:06d}.released"


def _heartbeat_path(state: str, shard: int, epoch: int) -> str:
    return f"{state}/heartbeats/{shard:05d}/{epoch:06d}.json"


def epochs(storage: Storage, state: str, shard: int) -> dict[int, bool]:
    """Every epoch of a shard in order, with whether it was released."""
    names = retrying(lambda: storage.list(claims_folder(state, shard)))
    found = sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json"))
    return {epoch: f"{epoch:06d}.released" in names for epoch in found}


def read_claim(storage: Storage, state: str, shard: int, epoch: int, is_released: bool) -> Claim:
    path = _claim_path(state, shard, epoch)
    value = parse_record(retrying(lambda: storage.read(path)) or b"", f"{storage.url}/{path}")
    return Claim(shard, epoch, ProcessIdentity.from_json(value["owner"]), is_released)


def read_heartbeat(storage: Storage, state: str, shard: int, epoch: int) -> Heartbeat | None:
    """The last heartbeat of an epoch; None before its first, or when a power cut spoilt it."""
    path = _heartbeat_path(state, shard, epoch)
    data = retrying(lambda: storage.read(path))
    if data is None:
        return None
    try:
        value = json.loads(data)
        return Heartbeat(value["nonce"], frozenset(value["in_flight"]), value["alone_progress"])
    except (ValueError, KeyError, TypeError):
        return None


class Lease:
    """Get one from `Ledger.claim`. Its heartbeat is written by the ledger's thread and by `set_in_flight`."""

    def __init__(self, storage: Storage, state: str, shard: int, epoch: int, attempt: str):
        self.shard = shard
        self.epoch = epoch
        self.attempt = attempt
        self._storage = storage
        self._state = state
        self._lock = threading.Lock()
        self._in_flight: frozenset[str] = frozenset()
        self._told: frozenset[str] = frozenset()  # as the last heartbeat said
        self._alone_progress: int | None = None
        self._is_lost = False
        self._is_released = False

    @property
    def is_lost(self) -> bool:
        """Somebody took the shard over: stop working on it (a commit would merely lose)."""
        return self._is_lost

    @property
    def is_held(self) -> bool:
        return not self._is_lost and not self._is_released

    def set_in_flight(self, row_ids: Iterable[str]) -> None:
        """Say which of the shard's rows the engine is about to run, before it runs them; written out at
        once, but where heartbeats are dear those that ended may stay on record until the next one.
        """
        rows = frozenset(row_ids)
        if self._storage.heartbeats_are_dear and self._alone_progress is None and rows <= self._told:
            self._in_flight = rows
            return
        self._tell(rows, None)

    def set_alone(self, row_id: str, progress: int) -> None:
        """Say that the engine runs this row and nothing else, and for how many steps it has; written at
        once.
        """
        self._tell(frozenset([row_id]), progress)

    def _tell(self, in_flight: frozenset[str], alone_progress: int | None) -> None:
        if (in_flight, alone_progress) != (self._in_flight, self._alone_progress):
            self._in_flight, self._alone_progress = in_flight, alone_progress
            self.beat()

    def beat(self) -> None:
        """Write a heartbeat with a new nonce."""
        with self._lock:
            told = self._in_flight
            content: dict[str, Any] = {
                "nonce": uuid.uuid4().hex,
                "in_flight": sorted(told),
                "alone_progress": self._alone_progress,
                "time": time.time(),  # for people; nothing compares it
            }
            path = _heartbeat_path(self._state, self.shard, self.epoch)
            retrying(lambda: self._storage.overwrite_heartbeat(path, json.dumps(content).encode()))
            self._told = told

    def look(self) -> None:
        """Find out whether a later epoch exists."""
        if max(epochs(self._storage, self._state, self.shard), default=self.epoch) > self.epoch:
            self._is_lost = True

    def release(self) -> None:
        """Give the shard back, so that the next claim need not wait; safe to call twice."""
        if not self._is_released:
            path = _released_path(self._state, self.shard, self.epoch)
            publish_record(self._storage, path, canonical_json({"attempt": self.attempt}))
            self._is_released = True


class LeaseBook:
    """Takes leases for one process and keeps them alive."""

    def __init__(
        self,
        storage: Storage,
        state: str,
        *,
        owner: ProcessIdentity,
        heartbeat_s: float = HEARTBEAT_S,
        takeover_s: float = TAKEOVER_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._storage = storage
        self._state = state
        self._owner = owner
        self._heartbeat_s = heartbeat_s
        self._takeover_s = takeover_s
        self._clock = clock
        self._held: list[Lease] = []
        self._watched: dict[tuple[int, int], tuple[str, float, float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self, shard: int) -> Lease | None:
        """The shard's lease, or None while another worker that may be alive holds it."""
        known = epochs(self._storage, self._state, shard)
        latest = max(known, default=0)
        if latest and not known[latest]:
            holder = read_claim(self._storage, self._state, shard, latest, False)
            if not self._is_dead(holder):
                return None
        attempt = uuid.uuid4().hex
        record = canonical_json(
            {"shard": shard, "epoch": latest + 1, "attempt": attempt, "owner": self._owner.to_json()}
        )
        if publish_record(self._storage, _claim_path(self._state, shard, latest + 1), record) != record:
            return None
        lease = Lease(self._storage, self._state, shard, latest + 1, attempt)
        lease.beat()
        self._held = [*(held for held in self._held if held.is_held), lease]
        self._start_thread()
        return lease

    def _is_dead(self, claim: Claim) -> bool:
        if claim.owner.is_gone():
            return True
        heartbeat = read_heartbeat(self._storage, self._state, claim.shard, claim.epoch)
        nonce = heartbeat.nonce if heartbeat else ""
        now = self._clock()
        key = (claim.shard, claim.epoch)
        seen = self._watched.get(key)
        if seen is None or seen[0] != nonce:
            self._watched[key] = (nonce, now, 0.0)
            return False
        # An observer that was itself stopped for a while has not watched: a gap counts for two heartbeats
        # at most.
        unchanged = seen[2] + min(now - seen[1], 2 * self._heartbeat_s)
        self._watched[key] = (nonce, now, unchanged)
        return unchanged >= self._takeover_s

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="tidemill-heartbeat", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            for lease in [lease for lease in self._held if lease.is_held]:
                try:
                    lease.beat()
                    lease.look()
                except TidemillError as error:
                    # Missed heartbeats cost at most a take-over; the worker meets the same fault by itself.
                    logger.warning("heartbeat of shard %d: %s", lease.shard, error)

    def close(self, release: bool = True) -> None:
        """Stop the heartbeat and, if told so, give back every lease still held."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        held, self._held = [lease for lease in self._held if lease.is_held], []
        for lease in held if release else []:
            lease.release()
