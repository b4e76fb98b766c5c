"""The leases of one process: taking them, keeping them alive, asking others for parts of theirs.

A holder is dead when it certainly ended on this machine, or when its nonce has not changed for
`takeover_s` of the observer's own watching. No clocks of two machines are compared. The chunks of a dead
holder's part go back to whoever let them, or to the shard's next epoch.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.errors import TidemillError
from pipeline.claims import (
    Claim,
    Claims,
    Ranges,
    claim_path,
    epoch_key,
    is_part_of,
    lessor,
    read_claim,
    read_claims,
    read_heartbeat,
)
from pipeline.commits import publish_record
from pipeline.fingerprint import canonical_json
from pipeline.lease import Lease, mark
from pipeline.process_identity import ProcessIdentity
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

HEARTBEAT_S = 20.0
TAKEOVER_S = 120.0
# Where looking costs no request to a store, holders look for what is asked of them more often than they beat.
LOOKS_PER_BEAT = 10
# So many may wait for one holder's answer: the others ask elsewhere, or later.
MAX_ASKS = 8


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Who is at work on a shard. `is_held`: the last epoch's holder may be alive; `parts`: those whose
    holders may be (looked for only where the epoch is not held).
    """

    claims: Claims
    is_held: bool
    parts: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """A part of a shard that was asked for."""

    shard: int
    key: str
    attempt: str


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
        self._watched: dict[tuple[int, str], tuple[str, float, float]] = {}
        self._known: dict[tuple[int, str], Claim] = {}  # of shards that others hold
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self, shard: int) -> Lease | None:
        """The lease of a whole shard, or None while another worker that may be alive is at it."""
        seen = self.look(shard)
        return None if seen.is_held or seen.parts else self.take(seen)

    def look(self, shard: int) -> Occupancy:
        """Find out who is at work on a shard."""
        claims = read_claims(self._storage, self._state, shard)
        latest = claims.latest
        if latest and not claims.epochs[latest] and not self._is_dead(self._claim(shard, epoch_key(latest))):
            return Occupancy(claims, is_held=True, parts=())
        return Occupancy(claims, is_held=False, parts=self._living(claims, claims.open_parts))

    def take(self, seen: Occupancy) -> Lease | None:
        """Begin the next epoch of a shard that is not held; None when somebody else was first."""
        shard, epoch = seen.claims.shard, seen.claims.latest + 1
        claim = Claim(shard, epoch_key(epoch), uuid.uuid4().hex, self._owner, None)
        owner = self._owner.to_json()
        record = canonical_json({"shard": shard, "epoch": epoch, "attempt": claim.attempt, "owner": owner})
        if publish_record(self._storage, claim_path(self._state, shard, claim.key), record) != record:
            return None
        return self._hold(Lease(self._storage, self._state, claim, _ranges(seen.parts)))

    def look_again(self, lease: Lease) -> None:
        """Find out anew which chunks of a lease others hold; the chunks of parts whose holders died are its
        own again.
        """
        claims = read_claims(self._storage, self._state, lease.shard)
        others = [key for key in claims.open_parts if key != lease.key and not is_part_of(lease.key, key)]
        lease.others = _ranges(self._living(claims, others))

    def ask(self, shard: int) -> Ask | None:
        """Ask one of those who work on a shard for a part of it; None where nobody may be asked now."""
        claims = read_claims(self._storage, self._state, shard)
        for key in claims.open_keys:
            if claims.has(key, "full") or len(claims.asks(key)) >= MAX_ASKS:
                continue
            ask = Ask(shard, claims.next_part(key), uuid.uuid4().hex)
            record = canonical_json({"attempt": ask.attempt, "owner": self._owner.to_json()})
            path = claim_path(self._state, ask.shard, ask.key, "ask")
            if publish_record(self._storage, path, record) == record:
                return ask
        return None

    def answer(self, ask: Ask) -> Lease | bool:
        """The lease of a part that was asked for; True while there may still be an answer, else False."""
        claims = read_claims(self._storage, self._state, ask.shard)
        asked = lessor(ask.key)
        if claims.has(ask.key, "json"):
            claim = read_claim(self._storage, self._state, ask.shard, ask.key)
            return self._hold(Lease(self._storage, self._state, claim))
        if claims.has(ask.key, "dead") or claims.has(asked, "full", "released", "dead"):
            return False
        return "-" in asked or claims.latest == int(asked)

    def _hold(self, lease: Lease) -> Lease:
        lease.beat()
        self._held = [*(held for held in self._held if held.is_held), lease]
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="tidemill-heartbeat", daemon=True)
            self._thread.start()
        return lease

    def _claim(self, shard: int, key: str) -> Claim:
        if (shard, key) not in self._known:
            self._known[shard, key] = read_claim(self._storage, self._state, shard, key)
        return self._known[shard, key]

    def _living(self, claims: Claims, keys: Iterable[str]) -> tuple[Claim, ...]:
        """The claims of these parts whose holders may be alive; it is put on record which are not."""
        living = []
        for key in keys:
            claim = self._claim(claims.shard, key)
            if self._is_dead(claim):
                mark(self._storage, self._state, claims.shard, key, "dead")
            else:
                living.append(claim)
        return tuple(living)

    def _is_dead(self, claim: Claim) -> bool:
        if claim.owner.is_gone():
            return True
        heartbeat = read_heartbeat(self._storage, self._state, claim.shard, claim.key)
        nonce = heartbeat.nonce if heartbeat else ""
        now = self._clock()
        key = (claim.shard, claim.key)
        seen = self._watched.get(key)
        if seen is None or seen[0] != nonce:
            self._watched[key] = (nonce, now, 0.0)
            return False
        # An observer that was itself stopped for a while has not watched: a gap counts for two heartbeats
        # at most.
        unchanged = seen[2] + min(now - seen[1], 2 * self._heartbeat_s)
        self._watched[key] = (nonce, now, unchanged)
        return unchanged >= self._takeover_s

    def _beat(self) -> None:
        looks = 1 if self._storage.requests_are_dear else LOOKS_PER_BEAT
        num_looks = 0
        while not self._stop.wait(self._heartbeat_s / looks):
            num_looks += 1
            for lease in [lease for lease in self._held if lease.is_held]:
                try:
                    if num_looks % looks == 0:
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


def _ranges(claims: Iterable[Claim]) -> Ranges:
    return tuple(each for claim in claims for each in claim.chunks or ())
