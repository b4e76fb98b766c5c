"""Several schedulers whose batches run in one step, and which of them a request goes to.

Each replica has pages and a prefix cache of its own, so a prompt costs least where its beginning is known
already. A request goes where the tokens still to compute, its own with them, are fewest: a prefix that a
replica has counts as that many tokens less there. So prompts that begin alike stay together as long as that
saves more than it unbalances, and then their beginning is computed on one more replica.

Plain Python, no JAX.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.inputs import TokenIds
from engine.plan import PageCopy, StepPlan, StepResults
from engine.prefix_cache import PrefixCache
from engine.request import Request
from engine.scheduler import Scheduler
from engine.scheduler_settings import SchedulerSettings, SchedulerStats
from engine.seat_table import SeatTable


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaPlans:
    """What a `StepPlan` is for one scheduler: a plan a replica, some of them of no rows."""

    each: tuple[StepPlan, ...]

    @property
    def num_rows(self) -> int:
        return sum(plan.num_rows for plan in self.each)

    @property
    def num_tokens(self) -> int:
        return sum(plan.num_tokens for plan in self.each)

    @property
    def size(self) -> tuple[int, int]:
        """The most tokens and the most rows of logits that a replica has."""
        return max(plan.num_tokens for plan in self.each), max(plan.num_logits for plan in self.each)

    @property
    def copies(self) -> tuple[Sequence[PageCopy], ...]:
        """By replica; empty when none has any."""
        copies = tuple(plan.copies for plan in self.each)
        return copies if any(copies) else ()

    @property
    def drawing(self) -> list[Request]:
        return [request for plan in self.each for request in plan.drawing]


class Replicas:
    """What a `Scheduler` is to the engine, over several of them."""

    def __init__(self, schedulers: Sequence[Scheduler]):
        self._schedulers = schedulers
        self._routing = PrefixRouting(len(schedulers), schedulers[0].settings.num_pages)
        # By request id and sample, which replica has it and the tokens it was counted as.
        self._places: dict[str, dict[int, tuple[int, int]]] = {}

    @property
    def cache(self) -> _AllCaches | None:
        caches = [scheduler.cache for scheduler in self._schedulers if scheduler.cache is not None]
        return _AllCaches(caches) if caches else None

    def add(self, request: Request, now: float | None = None) -> None:
        """Queue a request where it costs least. Raises as `Scheduler.add` does, having queued nothing."""
        places = self._places.get(request.request_id, {})
        # Of a request that is known already, the scheduler that has it says what is wrong.
        known = places.get(request.sample_index)
        hashes = self._page_hashes(request)
        total_len = request.expected_len or request.max_total_len
        replica, cost = self._routing.choose(hashes, total_len)
        self._schedulers[replica if known is None else known[0]].add(request, now)
        self._routing.take(replica, hashes, cost)
        self._places.setdefault(request.request_id, {})[request.sample_index] = (replica, cost)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, now: float | None = None
    ) -> None:
        self._scheduler_of(request).finish(request, reason, stop_reason, now)
        self._forget(request)

    def abort(self, request_id: str, now: float | None = None) -> list[Request]:
        aborted = [request for each in self._schedulers for request in each.abort(request_id, now)]
        for request in aborted:
            self._forget(request)
        return aborted

    def rename(self, request_id: str, new_id: str) -> None:
        places = self._places[new_id] = self._places.pop(request_id)
        for replica in {replica for replica, _ in places.values()}:
            self._schedulers[replica].rename(request_id, new_id)

    def forget_prefixes(self) -> None:
        for scheduler in self._schedulers:
            scheduler.forget_prefixes()
        self._routing.forget()

    def schedule(self, now: float | None = None) -> ReplicaPlans:
        return ReplicaPlans(tuple(scheduler.schedule(now) for scheduler in self._schedulers))

    def advance(self, plan: ReplicaPlans) -> None:
        for scheduler, each in zip(self._schedulers, plan.each, strict=True):
            if each.num_rows:
                scheduler.advance(each)

    def update(
        self, plan: ReplicaPlans, results: Sequence[StepResults], now: float | None = None
    ) -> list[Request]:
        finished: list[Request] = []
        for scheduler, each, result in zip(self._schedulers, plan.each, results, strict=True):
            if each.num_rows:
                finished += scheduler.update(each, result, now)
        for request in finished:
            self._forget(request)
        return finished

    @property
    def tables(self) -> list[SeatTable]:
        return [table for scheduler in self._schedulers for table in scheduler.tables]

    def preempt_all(self) -> None:
        for scheduler in self._schedulers:
            scheduler.preempt_all()

    @property
    def needs_tokens(self) -> bool:
        return any(scheduler.needs_tokens for scheduler in self._schedulers)

    def stats(self) -> SchedulerStats:
        """The sums of all."""
        return SchedulerStats.total([scheduler.stats() for scheduler in self._schedulers])

    def check_integrity(self) -> None:
        for scheduler in self._schedulers:
            scheduler.check_integrity()
        num_placed = sum(len(places) for places in self._places.values())
        num_unfinished = sum(scheduler.num_unfinished for scheduler in self._schedulers)
        if num_placed != num_unfinished:
            raise AssertionError(f"{num_placed} requests have a replica and {num_unfinished} are unfinished")
        if not num_placed and any(self._routing.loads):
            raise AssertionError(f"no request is unfinished and replicas count {self._routing.loads} tokens")

    def _page_hashes(self, request: Request) -> list[tuple[int, bytes]]:
        """The full pages of a prompt: the tokens to the end of each, and its hash."""
        cache = self._schedulers[0].cache
        if cache is None:
            return []
        size = cache.page_size
        hashes = cache.hashes(request, request.prompt_len // size)
        return [((index + 1) * size, page) for index, page in enumerate(hashes)]

    def _scheduler_of(self, request: Request) -> Scheduler:
        places = self._places.get(request.request_id, {})
        if request.sample_index not in places:
            raise ValueError(f"request {request.request_id!r} is not in a scheduler")
        return self._schedulers[places[request.sample_index][0]]

    def _forget(self, request: Request) -> None:
        places = self._places[request.request_id]
        self._routing.release(*places.pop(request.sample_index))
        if not places:
            del self._places[request.request_id]


def make_scheduler(settings: SchedulerSettings, num_replicas: int | None) -> Scheduler | Replicas:
    """A scheduler for one batch a step, or for those of `num_replicas`, each of these settings."""
    if num_replicas is None:
        return Scheduler(settings)
    return Replicas([Scheduler(settings) for _ in range(num_replicas)])


class PrefixRouting:
    """Chooses a replica for each request, by what each has to compute and what it knows.

    num_pages: how many pages a replica can hold; of more, those asked for last count as known.
    """

    def __init__(self, num_replicas: int, num_pages: int):
        self.loads = [0] * num_replicas
        """Tokens that each replica's unfinished requests were counted as."""
        self._num_pages = num_pages
        self._known: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(num_replicas)]

    def choose(self, pages: Sequence[tuple[int, bytes]], total_len: int) -> tuple[int, int]:
        """The replica for a request, and the tokens that it costs there.

        pages: the full pages of its prompt, the tokens to the end of each and its hash.
        total_len: tokens of prompt and output.
        """
        costs = [total_len - self._shared_len(known, pages) for known in self._known]
        replica = min(range(len(costs)), key=lambda index: (self.loads[index] + costs[index], index))
        return replica, costs[replica]

    def take(self, replica: int, pages: Iterable[tuple[int, bytes]], cost: int) -> None:
        """A request of these pages went there."""
        self.loads[replica] += cost
        known = self._known[replica]
        for _, page in pages:
            known[page] = None
            known.move_to_end(page)
        while len(known) > self._num_pages:
            known.popitem(last=False)

    def forget(self) -> None:
        """No replica has any page left."""
        for known in self._known:
            known.clear()

    def release(self, replica: int, cost: int) -> None:
        """A request that was counted as `cost` has ended."""
        self.loads[replica] -= cost

    @staticmethod
    def _shared_len(known: OrderedDict[bytes, None], pages: Sequence[tuple[int, bytes]]) -> int:
        shared_len = 0
        for stop, page in pages:
            if page not in known:
                break
            shared_len = stop
        return shared_len


@dataclass(frozen=True, slots=True)
class _AllCaches:
    """Pins hold on every replica: which of them will have the pages is not known yet."""

    caches: Sequence[PrefixCache]

    def pin(self, token_ids: TokenIds, cache_salt: str | None = None) -> None:
        for cache in self.caches:
            cache.pin(token_ids, cache_salt)

    def release(self, token_ids: TokenIds, cache_salt: str | None = None) -> None:
        for cache in self.caches:
            cache.release(token_ids, cache_salt)
