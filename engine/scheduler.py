"""Which tokens of which requests the next step computes.

There are no phases. A request has `num_tokens` known tokens of which `num_computed` have their keys
and values in pages; every step moves the second toward the first, under one budget of tokens. A long
prompt in chunks, a decode, a prefix found in the cache and a request that was preempted are all that.

Order is by age (fcfs) or by priority and then age. A request's pages can be taken by those before it
in this order, never by those after: so the first one always advances, and every admitted request
finishes.
"""

from __future__ import annotations

import heapq
from bisect import insort

from engine.errors import RequestError
from engine.page_pool import PagePool
from engine.plan import PlannedRow, StepPlan, StepResults
from engine.prefix_cache import PrefixCache
from engine.request import Request, RequestStatus
from engine.scheduler_settings import SchedulerSettings, SchedulerStats
from engine.step_results import record_prompt_logprobs, record_token

__all__ = ["Scheduler", "SchedulerSettings", "SchedulerStats"]


class _Step:
    """The plan being made: what is in it and what is left of the step's budgets."""

    __slots__ = ("chunks", "claims", "preempted", "singles", "spare_logits", "tokens_left")

    def __init__(self, max_tokens: int, spare_logits: int):
        self.singles: list[PlannedRow] = []
        self.chunks: list[PlannedRow] = []
        self.preempted: list[Request] = []
        # Hashes of the pages that this step's chunks are computing.
        self.claims: set[bytes] = set()
        self.tokens_left = max_tokens
        # Logits beyond the one that is set aside for each running request.
        self.spare_logits = spare_logits

    def take(self, row: PlannedRow) -> None:
        (self.singles if row.num_tokens == 1 else self.chunks).append(row)
        self.tokens_left -= row.num_tokens
        if row.num_logits > 1:
            self.spare_logits -= row.num_logits - 1

    def drop(self, request: Request) -> None:
        """Take a preempted request's row out again."""
        for rows in (self.singles, self.chunks):
            for index, row in enumerate(rows):
                if row.request is request:
                    del rows[index]
                    self.tokens_left += row.num_tokens
                    self.spare_logits += max(0, row.num_logits - 1)
                    return


class Scheduler:
    """Owns the waiting and running requests and their pages. One thread; `schedule`, then `update`."""

    def __init__(self, settings: SchedulerSettings):
        self.settings = settings
        self.pool = PagePool(settings.num_pages)
        self.cache = PrefixCache(settings.page_size, self.pool) if settings.enable_prefix_caching else None
        # By request id, then by sample index.
        self._unfinished: dict[str, dict[int, Request]] = {}
        # A heap; what was aborted while waiting stays until it comes to the top.
        self._waiting: list[tuple[int, int, Request]] = []
        self._running: list[Request] = []  # in order
        self._num_unfinished = 0
        self._next_arrival = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

    # -- requests come and go ----------------------------------------------------------------------

    def add(self, request: Request, now: float | None = None) -> None:
        """Queue a new request. Raises RequestError when it could never run, with the numbers."""
        limits = self.settings
        if request.status is not RequestStatus.WAITING or request.num_computed or request.output_token_ids:
            raise ValueError(f"request {request.request_id!r} was given to a scheduler before")
        if request.sample_index in self._unfinished.get(request.request_id, ()):
            raise RequestError(
                "duplicate_request_id",
                f"request {request.request_id!r} sample {request.sample_index} is unfinished already: "
                "give each request an id of its own",
            )
        limits.check(request)
        request.arrival = self._next_arrival
        request.arrival_time = now
        self._next_arrival += 1
        self._unfinished.setdefault(request.request_id, {})[request.sample_index] = request
        self._num_unfinished += 1
        self._wait(request)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, now: float | None = None
    ) -> None:
        """End a request for a reason found outside (a stop string in its text), and free its pages.

        Raises ValueError when it has ended before: a request ends once.
        """
        if request.status is RequestStatus.FINISHED:
            raise ValueError(
                f"request {request.request_id!r} has finished before, by {request.finish_reason!r}"
            )
        if self._unfinished.get(request.request_id, {}).get(request.sample_index) is not request:
            raise ValueError(f"request {request.request_id!r} is not in this scheduler")
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        self._end(request, reason, stop_reason, now)

    def abort(self, request_id: str, now: float | None = None) -> list[Request]:
        """End every unfinished sample with this id, waiting or running; returns them (none if unknown)."""
        aborted = list(self._unfinished.get(request_id, {}).values())
        for request in aborted:
            self.finish(request, "abort", now=now)
        return aborted

    # -- one step ----------------------------------------------------------------------------------

    def schedule(self, now: float | None = None) -> StepPlan:
        """Decide the next step. The rows are valid until `update`, or until the next `schedule`.

        Running requests come first: those with one token left (decodes), then the rest, each in order.
        Waiting ones are admitted into what is left of the budget, unless pages just ran out.
        """
        limits = self.settings
        step = _Step(limits.max_num_batched_tokens, limits.max_num_seqs - len(self._running))
        page_size = limits.page_size
        chunked: list[Request] = []
        num_decodes = 0
        for request in tuple(self._running):
            num_computed = request.num_computed
            if request.prompt_len + len(request.output_token_ids) - num_computed > 1:
                chunked.append(request)
            # The common case, in line: one token, and the last page has room for it.
            elif num_computed < len(request.page_ids) * page_size:
                row = PlannedRow(request, num_computed, 1, True, 1, request.page_ids)
                step.singles.append(row)
                num_decodes += 1
            elif request.status is RequestStatus.RUNNING:  # it may have lost its place to one before it
                self._plan_running(request, step)
        step.tokens_left -= num_decodes
        for request in chunked:
            if request.status is RequestStatus.RUNNING:
                self._plan_running(request, step)
        if self._waiting and not step.preempted:
            self._admit(step, now)
        return StepPlan((*step.singles, *step.chunks), tuple(step.preempted))

    def update(self, plan: StepPlan, results: StepResults, now: float | None = None) -> list[Request]:
        """Record what a step computed; returns the requests that ended with it, their pages freed.

        Requests that were finished or aborted since `schedule` are passed over. Raises ValueError when the
        results do not belong to the plan, or the plan is not the last one.
        """
        finished: list[Request] = []
        cache, page_size = self.cache, self.settings.page_size
        for row, result in zip(plan.rows, results, strict=True):
            request = row.request
            if request.status is not RequestStatus.RUNNING or request.num_computed != row.start:
                if request.status is RequestStatus.FINISHED:
                    continue
                raise ValueError(
                    f"the plan is not the last one: request {request.request_id!r} has moved since"
                )
            request.num_computed = num_computed = row.start + row.num_tokens
            if row.num_logits > row.samples:
                record_prompt_logprobs(row, result)
            if cache is not None and num_computed >= (request.num_shared_pages + 1) * page_size:
                cache.insert(request)
            if row.samples and record_token(request, result, now):
                finished.append(request)
        if finished:
            self._running = [request for request in self._running if request.finish_reason is None]
            for request in finished:
                self._end(request, request.finish_reason or "stop", request.stop_reason, now)
        return finished

    @property
    def has_unfinished(self) -> bool:
        return self._num_unfinished > 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_unfinished - len(self._running)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_free_pages=self.pool.num_free,
            num_cached_pages=self.pool.num_cached,
            num_held_pages=self.pool.num_held,
            num_evictions=self.pool.num_evictions,
        )

    # -- planning ----------------------------------------------------------------------------------

    def _plan_running(self, request: Request, step: _Step) -> None:
        """Plan the request's next tokens, taking pages from those after it when there are none left."""
        num_tokens = self._chunk_len(request, step)
        if num_tokens < 1:
            return
        missing = self.settings.num_pages_for(request.num_computed + num_tokens) - len(request.page_ids)
        while missing > self.pool.num_available:
            victim = self._running[-1]
            self._preempt(victim, step)
            if victim is request:
                return
        self._plan(request, num_tokens, step)

    def _chunk_len(self, request: Request, step: _Step) -> int:
        """How many of the request's remaining tokens fit in what is left of the step."""
        num_tokens = min(request.remain_len, step.tokens_left)
        if self.settings.long_prefill_token_threshold is not None:
            num_tokens = min(num_tokens, self.settings.long_prefill_token_threshold)
        if due := request.num_prompt_logprobs_due:
            # Positions recorded before a preemption need no logits again; each one after them needs one.
            num_recorded = request.prompt_len - 1 - due
            num_silent = max(0, num_recorded - request.num_computed)
            num_tokens = min(num_tokens, num_silent + 1 + step.spare_logits)
        return num_tokens

    def _plan(self, request: Request, num_tokens: int, step: _Step) -> None:
        start = request.num_computed
        stop = start + num_tokens
        num_pages = self.settings.num_pages_for(stop)
        if num_pages > len(request.page_ids):
            request.page_ids += self.pool.allocate(num_pages - len(request.page_ids))
        elif num_pages < len(request.page_ids):  # a plan that was given up had asked for more
            self.pool.release(request.page_ids[num_pages:])
            del request.page_ids[num_pages:]
        samples = stop == request.num_tokens
        if due := request.num_prompt_logprobs_due:
            num_logits = max(0, stop - max(start, request.prompt_len - 1 - due))
        else:
            num_logits = int(samples)
        step.take(PlannedRow(request, start, num_tokens, samples, num_logits, request.page_ids))
        if self.cache is not None and self._waiting:
            # Every page the row touches and will fill from tokens known now: the one it ends in is the
            # request's next chunk.
            page_size = self.settings.page_size
            last = min(self.settings.num_pages_for(stop), request.num_tokens // page_size)
            step.claims.update(self.cache.hashes(request, last)[start // page_size : last])

    def _admit(self, step: _Step, now: float | None) -> None:
        """Start waiting requests, in order, while the step has room and the pages suffice for all.

        A request whose next page is being computed in this very step is passed over: it will find the page
        in a step or two, and then share it. The claim lasts as long as this step's plan, so an owner that is
        preempted or aborted leaves nobody waiting.
        """
        limits = self.settings
        reserved = sum(map(self._num_pages_to_come, self._running))
        passed_over: list[Request] = []
        while (
            self._waiting
            and step.tokens_left > 0
            and step.spare_logits > 0
            and len(self._running) < limits.max_num_seqs
            and len(passed_over) < limits.max_num_seqs  # bounds the work of one step
        ):
            request = heapq.heappop(self._waiting)[-1]
            if request.status is RequestStatus.FINISHED:
                continue
            readable = self._num_readable_tokens(request)
            pages = self.cache.match(request, readable) if self.cache is not None else []
            if self._is_claimed(request, len(pages), readable, step):
                passed_over.append(request)
                continue
            # Room for its known tokens and a page more, and for the same of everyone running: a request
            # admitted into less would soon be preempted, or preempt.
            num_unheld = sum(not self.pool.is_held(page) for page in pages)
            to_come = self._num_pages_to_come(request) - len(pages)
            if reserved + to_come + num_unheld > self.pool.num_available:
                self._wait(request)
                break
            self._start(request, pages, readable, now)
            step.spare_logits -= 1
            self._plan(request, self._chunk_len(request, step), step)
            reserved += self._num_pages_to_come(request)
        for request in passed_over:
            self._wait(request)

    def _start(self, request: Request, pages: list[int], readable: int, now: float | None) -> None:
        self.pool.share(pages)
        request.page_ids = pages
        request.num_shared_pages = len(pages)
        request.num_computed = len(pages) * self.settings.page_size
        request.status = RequestStatus.RUNNING
        if request.num_preemptions == 0:
            request.first_scheduled_time = now
            request.num_cached_tokens = request.num_computed
            if readable:
                self._num_prefix_queries += request.prompt_len
                self._num_prefix_hits += request.num_computed
        insort(self._running, request, key=self._order)

    def _preempt(self, request: Request, step: _Step) -> None:
        """Take a request's pages and let it wait again; its tokens stay known and are computed anew."""
        self._running.remove(request)
        step.drop(request)
        step.preempted.append(request)
        self._free(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self._num_preemptions += 1
        self._wait(request)

    def _num_readable_tokens(self, request: Request) -> int:
        """Most tokens the request may take from the prefix cache: a logit has to come out of the last token,
        and one out of each prompt position whose log-probability is due."""
        if self.cache is None:
            return 0
        if due := request.num_prompt_logprobs_due:
            return request.prompt_len - 1 - due
        return request.num_tokens - 1

    def _is_claimed(self, request: Request, num_found: int, readable: int, step: _Step) -> bool:
        if self.cache is None or not step.claims or (num_found + 1) * self.settings.page_size > readable:
            return False
        return self.cache.hashes(request, num_found + 1)[num_found] in step.claims

    def _num_pages_to_come(self, request: Request) -> int:
        """Pages the request lacks for its known tokens and one page more (or its end)."""
        num_tokens = min(request.num_tokens + self.settings.page_size, request.max_total_len)
        return max(0, self.settings.num_pages_for(num_tokens) - len(request.page_ids))

    def _order(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.settings.policy == "priority" else 0, request.arrival)

    def _wait(self, request: Request) -> None:
        # By age, so a preempted request comes before all that were never admitted.
        heapq.heappush(self._waiting, (*self._order(request), request))

    # -- ends ----------------------------------------------------------------------------------------

    def _free(self, request: Request) -> None:
        # A new list: the plan in flight may still be looking at the old one.
        pages, request.page_ids = request.page_ids, []
        self.pool.release(pages)

    def _end(self, request: Request, reason: str, stop_reason: int | str | None, now: float | None) -> None:
        self._free(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.finished_time = now
        request.page_hashes = []
        siblings = self._unfinished[request.request_id]
        del siblings[request.sample_index]
        if not siblings:
            del self._unfinished[request.request_id]
        self._num_unfinished -= 1

    def check_integrity(self) -> None:
        """Raises AssertionError unless pages, holders and requests add up, as between any two operations."""
        self.pool.check_integrity()
        if self.cache is not None:
            self.cache.check_integrity()
        holders = [0] * self.settings.num_pages
        for request in self._running:
            if request.status is not RequestStatus.RUNNING:
                raise AssertionError(f"{request.request_id} runs but is {request.status}")
            if len(request.page_ids) < self.settings.num_pages_for(request.num_computed):
                raise AssertionError(f"{request.request_id} has computed more than its pages hold")
            for index, page in enumerate(request.page_ids):
                holders[page] += 1
                if index >= request.num_shared_pages and self.pool.num_holders(page) != 1:
                    raise AssertionError(
                        f"page {page} is writable by {request.request_id} and held by another"
                    )
        if holders != [self.pool.num_holders(page) for page in range(self.settings.num_pages)]:
            raise AssertionError("a page's reference count is not the number of its holders")
        if [*map(self._order, self._running)] != sorted(map(self._order, self._running)):
            raise AssertionError("the running requests are out of order")
        num_known = sum(map(len, self._unfinished.values()))
        num_waiting = sum(request.status is RequestStatus.WAITING for *_, request in self._waiting)
        if not num_known == self._num_unfinished == num_waiting + len(self._running):
            raise AssertionError("a request is lost or counted twice")
