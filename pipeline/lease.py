"""Leases: one worker at a time on a chunk, so that work is not done twice. Safety never rests on them.

Who takes a shard (an *epoch*) has all of it. A worker without work asks it for a *part* of what it has not
begun, and is let the chunks that the holder names: nobody takes what another may have begun. What is on
record of this is in pipeline/claims.py, who takes leases in pipeline/lease_book.py.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.claims import Claim, Ranges, claim_path, epoch_key, heartbeat_path, is_inside, read_claims
from pipeline.commits import damaged, parse_record, publish_record, retrying
from pipeline.fingerprint import canonical_json
from pipeline.process_identity import ProcessIdentity
from pipeline.storage import Storage


@dataclass(frozen=True, slots=True)
class Suspects:
    """Row ids implicated in the deaths of a shard's former workers (see pipeline/suspects.py)."""

    isolate: frozenset[str] = frozenset()  # run these with nothing else in flight
    quarantined: frozenset[str] = frozenset()  # reject these with reason `quarantined`


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks for a part: the process, and the attempt that it will make."""

    attempt: str
    owner: ProcessIdentity


class Lease:
    """Get one from `Ledger.claim`. Its heartbeat is written by the ledger's thread and by `set_in_flight`.

    `others`: chunks that are not to be run under it, because others hold them.
    """

    def __init__(self, storage: Storage, state: str, claim: Claim, others: Ranges = ()):
        self.shard = claim.shard
        self.epoch = claim.epoch
        self.key = claim.key
        self.attempt = claim.attempt
        self.others = others
        self.asks: tuple[str, ...] = ()
        """Parts that others ask for, as of the last look."""
        self._chunks = claim.chunks
        self._answered: set[str] = set()
        self._is_full = False
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

    @property
    def is_first(self) -> bool:
        """Nobody held the shard before."""
        return self.key == epoch_key(1)

    @property
    def is_part(self) -> bool:
        return self._chunks is not None

    def covers(self, chunk: int) -> bool:
        """Whether the chunk is to be run under this lease."""
        is_own = self._chunks is None or is_inside(chunk, self._chunks)
        return is_own and not is_inside(chunk, self.others)

    def set_in_flight(self, row_ids: Iterable[str]) -> None:
        """Say which of the shard's rows the engine is about to run, before it runs them; written out at
        once, but where heartbeats are dear those that ended may stay on record until the next one.
        """
        rows = frozenset(row_ids)
        if self._storage.requests_are_dear and self._alone_progress is None and rows <= self._told:
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
            path = heartbeat_path(self._state, self.shard, self.key)
            retrying(lambda: self._storage.overwrite_heartbeat(path, json.dumps(content).encode()))
            self._told = told

    def look(self) -> None:
        """Find out whether somebody took it over, and what is asked of its holder."""
        claims = read_claims(self._storage, self._state, self.shard)
        if claims.has(self.key, "dead") if self.is_part else claims.latest > self.epoch:
            self._is_lost = True
        asks = () if self._is_full else claims.asks(self.key)
        self.asks = tuple(ask for ask in asks if ask not in self._answered)

    def asker(self, part: str) -> Asker | None:
        """Who asks for a part; None when that process is gone, which is put on record."""
        path = claim_path(self._state, self.shard, part, "ask")
        place = f"{self._storage.url}/{path}"
        value = parse_record(retrying(lambda: self._storage.read(path)) or b"", place)
        try:
            asker = Asker(value["attempt"], ProcessIdentity.from_json(value["owner"]))
        except (KeyError, TypeError) as error:
            raise damaged(place) from error
        if not asker.owner.is_gone():
            return asker
        mark(self._storage, self._state, self.shard, part, "dead")
        self._forget(part)
        return None

    def let(self, part: str, asker: Asker, chunks: Ranges) -> None:
        """Let chunks to who asked. Nothing of them may have been begun, nor be begun from now on."""
        record = {
            "shard": self.shard,
            "epoch": self.epoch,
            "attempt": asker.attempt,
            "owner": asker.owner.to_json(),
            "chunks": chunks,
        }
        publish_record(self._storage, claim_path(self._state, self.shard, part), canonical_json(record))
        self._forget(part)

    def let_no_more(self) -> None:
        """Tell all who ask that nothing is left that is not begun."""
        mark(self._storage, self._state, self.shard, self.key, "full")
        self._is_full, self.asks = True, ()

    def _forget(self, part: str) -> None:
        """It is answered, though a look at the record that began before may still say otherwise."""
        self._answered.add(part)
        self.asks = tuple(ask for ask in self.asks if ask != part)

    def release(self) -> None:
        """Give the shard, or the part, back, so that the next claim need not wait; safe to call twice."""
        if not self._is_released:
            mark(self._storage, self._state, self.shard, self.key, "released")
            self._is_released = True


def mark(storage: Storage, state: str, shard: int, key: str, kind: str) -> None:
    """Put on record that a claim is `released`, `dead` or `full`; harmless to repeat."""
    publish_record(storage, claim_path(state, shard, key, kind), canonical_json({kind: key}))
