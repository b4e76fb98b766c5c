"""Who waits, and who of them is next.

    level     requests of one priority (all of them where the policy is fcfs)
    tenant    within a level: the requests of one tenant, the oldest first

**Levels age.** Of several levels the one goes first whose oldest request has the lowest rank, priority x
`aging_steps` + the step in which it came. So one that waits is overtaken by a request of a priority p levels
more urgent only if that came less than p x `aging_steps` steps after it: what comes later waits behind it.

**Tenants take turns of equal tokens** (the virtual token counter of Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024). A tenant's counter grows by the tokens of its requests: those of a prompt that
were not cached when it starts, and those that are drawn. The tenant with the lowest counter is next. One that
comes to wait begins no lower than the one served last: nobody saves up turns by asking for nothing.

Requests that had started before, and lost their pages, come first in their level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush, heapreplace

from engine.request import Request
from engine.scheduler_settings import SchedulerSettings

_Heap = list[tuple[int, Request]]
"""By arrival, the oldest first."""

_MAX_IDLE = 1024
"""Counters of tenants that wait for nothing, kept before they are looked through."""


class WaitingQueue:
    """The waiting requests. One that ends while it waits stays until its turn: the caller passes it over."""

    def __init__(self, settings: SchedulerSettings):
        self._settings = settings
        self._has_levels = settings.policy == "priority"
        self._levels: dict[int, _Level] = {}
        self._counters = _Counters()

    def __bool__(self) -> bool:
        return bool(self._levels)

    def __iter__(self) -> Iterator[Request]:
        """In no order."""
        for level in self._levels.values():
            yield from level

    def push(self, request: Request) -> None:
        key = request.priority if self._has_levels else 0
        level = self._levels.get(key)
        if level is None:
            level = self._levels[key] = _Level(self._counters)
        level.push(request)

    def pop(self) -> Request:
        """Take out who is next; there must be one."""
        levels = self._levels
        key = next(iter(levels))
        if len(levels) > 1:
            key = min(levels, key=lambda key: self._settings.rank(levels[key].oldest))
        request = levels[key].pop()
        if not levels[key]:
            del levels[key]
        return request

    @property
    def has_tenants(self) -> bool:
        """There has been more than one."""
        return self._counters.is_shared

    def charge_start(self, request: Request) -> None:
        """It starts for the first time: its prompt's tokens that are left to compute are its tenant's."""
        if self._counters.is_shared:
            self._counters.serve(request.tenant, request.remain_len)
            request.num_charged = request.num_output_tokens

    def charge_drawn(self, requests: Iterable[Request]) -> None:
        """What these have drawn since the last time is their tenants'."""
        for request in requests:
            num_drawn = request.num_output_tokens
            self._counters.add(request.tenant, num_drawn - request.num_charged)
            request.num_charged = num_drawn


class _Counters:
    """The tokens that each tenant has been served, above what one had that came anew."""

    def __init__(self) -> None:
        self.is_shared = False
        self._tokens: dict[str | None, int] = {}
        self._num_waiting: dict[str | None, int] = {}  # levels in which it waits
        self._clock = 0  # of the tenant that was served last, when it was

    def __getitem__(self, tenant: str | None) -> int:
        return self._tokens.get(tenant, self._clock)

    def begin_to_wait(self, tenant: str | None) -> None:
        """It has requests in a level, where it had none."""
        self._num_waiting[tenant] = self._num_waiting.get(tenant, 0) + 1
        if self._num_waiting[tenant] == 1:
            self._tokens[tenant] = max(self[tenant], self._clock)
            self.is_shared = self.is_shared or len(self._tokens) > 1
            if len(self._tokens) > 2 * len(self._num_waiting) + _MAX_IDLE:
                self._forget_idle()

    def end_to_wait(self, tenant: str | None) -> None:
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]

    def serve(self, tenant: str | None, num_tokens: int) -> None:
        """It was its turn."""
        self._clock = max(self._clock, self[tenant])
        self.add(tenant, num_tokens)

    def add(self, tenant: str | None, num_tokens: int) -> None:
        if num_tokens:
            self._tokens[tenant] = self[tenant] + num_tokens

    def _forget_idle(self) -> None:
        """Those that would begin anew at what they have."""
        self._tokens = {
            tenant: tokens
            for tenant, tokens in self._tokens.items()
            if tokens > self._clock or tenant in self._num_waiting
        }


class _Level:
    """The waiting requests of one priority."""

    def __init__(self, counters: _Counters):
        self._counters = counters
        self._returning: _Heap = []
        self._tenants: dict[str | None, _Heap] = {}
        # (counter, arrival of its oldest, tenant), once a tenant: who is next. That its counter has grown, or
        # that it has left, is seen when its turn comes.
        self._turns: list[tuple[int, int, str | None]] = []
        self._has_turn: set[str | None] = set()

    def __bool__(self) -> bool:
        return bool(self._returning or self._tenants)

    def __iter__(self) -> Iterator[Request]:
        for heap in (self._returning, *self._tenants.values()):
            yield from [request for _, request in heap]

    @property
    def oldest(self) -> Request:
        heads = [heap[0] for heap in (self._returning, *self._tenants.values()) if heap]
        return min(heads)[1]

    def push(self, request: Request) -> None:
        entry = (request.arrival, request)
        if request.num_preemptions:
            heappush(self._returning, entry)
            return
        tenant = request.tenant
        heap = self._tenants.get(tenant)
        if heap is None:
            self._tenants[tenant] = [entry]
            self._counters.begin_to_wait(tenant)
            if tenant not in self._has_turn:
                self._has_turn.add(tenant)
                heappush(self._turns, (self._counters[tenant], request.arrival, tenant))
        else:
            heappush(heap, entry)

    def pop(self) -> Request:
        if self._returning:
            return heappop(self._returning)[1]
        if len(self._tenants) == 1:
            (tenant,) = self._tenants
        else:
            tenant = self._next_tenant()
        heap = self._tenants[tenant]
        request = heappop(heap)[1]
        if not heap:
            del self._tenants[tenant]
            self._counters.end_to_wait(tenant)
        return request

    def _next_tenant(self) -> str | None:
        while True:
            counter, _, tenant = self._turns[0]
            if tenant not in self._tenants:
                heappop(self._turns)
                self._has_turn.remove(tenant)
            elif counter == self._counters[tenant]:
                return tenant
            else:
                arrival, _ = self._tenants[tenant][0]
                heapreplace(self._turns, (self._counters[tenant], arrival, tenant))
