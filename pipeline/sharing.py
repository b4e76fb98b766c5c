"""Taking unstarted chunks of another's shard, so that the last shards do not wait for their slowest worker.

A worker without work asks a holder for a part (`HeldShards`); the holder, between two steps, lets go of
chunks that it has not begun (`let_parts`). So no chunk is run by two, and nothing but the listing of one
shard's folder is needed to find work.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from pipeline.lease import Lease
from pipeline.lease_book import Ask
from pipeline.ledger import Ledger
from pipeline.open_work import OpenShard, merge_ranges
from pipeline.plan import RunPlan

HELD_POLL_SECONDS = 2.0
# Of many shards that others hold, so many are looked at each time.
LOOKS_PER_POLL = 4
# Those that are finished are found by one listing, a request for so many shards of the run: each time in a
# run of no more, less often in a larger one.
SHARDS_PER_LISTING = 1000


class HeldShards:
    """Shards that others hold, looked at in turn: one may have become free, or a part of it may be had."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic):
        self._ledger = ledger
        self._clock = clock
        self._indices: deque[int] = deque()
        self._next_poll = 0.0
        self._next_listing = 0.0
        self._ask: Ask | None = None

    def __bool__(self) -> bool:
        return bool(self._indices)

    def add(self, index: int) -> None:
        self._indices.append(index)

    def next_lease(self) -> Lease | None:
        """A lease of a shard that is free now, or of a part of one; None when there is none yet, or when it
        is not time to look.
        """
        if not self._indices or self._clock() < self._next_poll:
            return None
        self._next_poll = self._clock() + HELD_POLL_SECONDS
        self._forget_finished()
        lease = self._answered() or self._freed()
        if lease is None and self._ask is None and self._indices:
            # At random, so that workers without work do not all ask the same one. No row depends on this.
            self._ask = self._ledger.leases.ask(random.choice(self._indices))
        return lease

    def _forget_finished(self) -> None:
        if len(self._indices) <= LOOKS_PER_POLL or self._clock() < self._next_listing:
            return
        num_listings = 1 + len(self._ledger.plan.shards) // SHARDS_PER_LISTING
        self._next_listing = self._clock() + num_listings * HELD_POLL_SECONDS
        finished = self._ledger.finished_now()
        self._indices = deque(index for index in self._indices if index not in finished)

    def _answered(self) -> Lease | None:
        answer = self._ledger.leases.answer(self._ask) if self._ask else False
        if isinstance(answer, Lease):
            self._ask = None
            with suppress(ValueError):  # it was found finished meanwhile
                self._indices.remove(answer.shard)
            return answer
        if not answer:
            self._ask = None
        return None

    def _freed(self) -> Lease | None:
        for _ in range(min(LOOKS_PER_POLL, len(self._indices))):
            index = self._indices.popleft()
            lease = self._ledger.claim(index)
            if lease is not None:
                if self._ask is not None and self._ask.shard == index:
                    self._ask = None  # the whole shard was to be had
                return lease
            if not self._ledger.is_known_finished(index):
                self._indices.append(index)
        return None


def let_parts(opened: OpenShard, plan: RunPlan) -> None:
    """Answer those who ask for parts of a shard: of the chunks that are not begun, each gets a like share of
    the last ones, and a like share is kept.

    Only what is in windows whose order is on record is let, because the order decides which rows a chunk has.
    """
    lease, assignment = opened.lease, opened.assignment
    if not lease.asks or assignment is None:
        return
    shard = opened.shard.index
    free = sorted(
        chunk for chunk in opened.todo if plan.chunk_bounds(shard, chunk)[1] <= assignment.settled_stop
    )
    if not free:
        if assignment.settled_stop >= assignment.ranges[-1][1]:
            lease.let_no_more()
        return
    askers = [(part, asker) for part in lease.asks if (asker := lease.asker(part)) is not None]
    num_kept = len(free) // (len(askers) + 1)
    if opened.num_missing == len(opened.todo):
        num_kept = max(num_kept, 1)  # nothing is begun
    given = free[num_kept:]
    for number, (part, asker) in enumerate(askers):
        chunks = given[number * len(given) // len(askers) : (number + 1) * len(given) // len(askers)]
        if chunks:
            for chunk in chunks:
                opened.give_up(chunk, plan.chunk_bounds(shard, chunk))
            lease.let(part, asker, merge_ranges([(chunk, chunk + 1) for chunk in chunks]))
