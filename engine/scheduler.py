"""Which tokens of which requests the next step computes.

There are no phases. A request has `num_tokens` known tokens of which `num_computed` have their keys
and values in pages; every step moves the second toward the first, under one budget of tokens. A long
prompt in chunks, a decode, a prefix found in the cache and a request that was preempted are all that.

Order is by age (fcfs) or by priority and then age. A request's pages can be taken by those before it
in this order, never by those after: so the first one always advances, and every admitted request
finishes.
"""

from __future__ import annotations

from engine.admission import Admission
from engine.errors import RequestError
from engine.page_pool import PagePool
from engine.plan import PlannedRow, StepPlan, StepResults
from engine.prefix_cache import HashPage, PrefixCache, page_hash
from engine.request import Request, RequestStatus
from engine.scheduler_settings import SchedulerSettings, SchedulerStats
from engine.step_draft import StepDraft
from engine.step_results import ends_with, record_logprob, record_prompt_logprobs

__all__ = ["Scheduler", "SchedulerSettings", "SchedulerStats"]


class Scheduler:
    """Owns the unfinished requests and their pages. One thread.

    A step is `schedule`, `advance` when it is dispatched, and `update` with its results. One step may be in
    flight, dispatched and not updated, while the next is planned; before it is advanced, that one is updated.

    hash_page: how the prefix cache hashes a page; only tests give another one, to force collisions.
    """

    def __init__(self, settings: SchedulerSettings, hash_page: HashPage = page_hash):
        self.settings = settings
        self.pool = PagePool(settings.num_pages)
        self.cache = (
            PrefixCache(settings.page_size, self.pool, hash_page) if settings.enable_prefix_caching else None
        )
        self._admission = Admission(settings, self.pool, self.cache)
        # By request id, then by sample index.
        self._unfinished: dict[str, dict[int, Request]] = {}
        self._running: list[Request] = []  # in order
        self._num_unfinished = 0
        self._next_arrival = 0
        self._num_preemptions = 0
        self._num_leaving = 0
        self._num_generated_tokens = 0
        self._advanced: StepPlan | None = None

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
        self._admission.wait(request)

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

    def rename(self, request_id: str, new_id: str) -> None:
        """The unfinished samples with this id have been given another one."""
        self._unfinished[new_id] = self._unfinished.pop(request_id)

    # -- one step ----------------------------------------------------------------------------------

    def schedule(self, now: float | None = None) -> StepPlan:
        """Decide the next step. The rows are valid until `advance`, or until the next `schedule`.

        Running requests come first: those with one token left (decodes), then the rest, each in order.
        Waiting ones are admitted into what is left of the budget, unless pages just ran out.
        """
        limits = self.settings
        step = StepDraft(limits.max_num_batched_tokens, limits.max_num_seqs - len(self._running))
        page_size = limits.page_size
        chunked: list[Request] = []
        num_decodes = 0
        add, make_row = step.singles.append, tuple.__new__  # a third of the time of PlannedRow(...)
        for request in tuple(self._running):
            num_computed = request.num_computed
            if not request.num_pending and request.remain_len > 1:
                chunked.append(request)
            # The common case, in line: one token, and the last page has room for it.
            elif num_computed % page_size:
                add(make_row(PlannedRow, (request, num_computed, 1, True, 1, request.page_ids)))
                num_decodes += 1
            elif request.status is RequestStatus.RUNNING:  # it may have lost its place to one before it
                self._plan_running(request, step)
        step.tokens_left -= num_decodes
        for request in chunked:
            if request.status is RequestStatus.RUNNING:
                self._plan_running(request, step)
        if not step.preempted:
            self._admission.admit(step, self._running, self._plan_chunk, now)
        rows = (*step.singles, *step.chunks)
        return StepPlan(rows, tuple(step.preempted), self._admission.copies())

    def advance(self, plan: StepPlan) -> None:
        """The plan is dispatched: what it computes counts as computed, what it draws is pending.

        Steps run in the order of their dispatch. So from here on a page that the plan fills may be read by
        the steps to come, and one that it only writes to for a request that has ended meanwhile may be
        given to another: they write after it. A request whose last token is being drawn leaves at once.

        Requests that were finished since `schedule` are passed over. Raises ValueError when the plan is not
        the last one.
        """
        self._admission.copied()
        cache, page_size = self.cache, self.settings.page_size
        running, is_leaving = RequestStatus.RUNNING, False
        for request, start, num_tokens, samples, _, _ in plan.rows:
            if request.num_computed != start or request.status is not running:
                if request.status is RequestStatus.FINISHED:
                    continue
                raise ValueError(
                    f"the plan is not the last one: request {request.request_id!r} has moved since"
                )
            request.num_computed = num_computed = start + num_tokens
            # All of these tokens are known: only the last of a request can be pending, and that is not
            # computed before the step after the one that draws it.
            if cache is not None and num_computed >= (request.num_shared_pages + 1) * page_size:
                cache.insert(request)
            if samples:
                if cache is not None and num_tokens > 1:
                    cache.insert_rest(request)
                request.num_pending = 1
                if num_computed >= request.max_computed_len:
                    self._leave(request)
                    is_leaving = True
        if is_leaving:
            self._running = [request for request in self._running if request.status is running]
        self._advanced = plan

    def update(self, plan: StepPlan, results: StepResults, now: float | None = None) -> list[Request]:
        """Record what a step drew; returns the requests that ended with it, their pages freed.

        A plan that was not dispatched before (`advance`) is taken as such here. Requests that were finished
        or aborted since are passed over; those preempted since keep their token. Raises ValueError when the
        results do not belong to the plan.
        """
        if len(results.token_ids) != len(plan.rows):
            raise ValueError(f"{len(results.token_ids)} results came for {len(plan.rows)} rows")
        if self._advanced is not plan:
            self.advance(plan)
        self._advanced = None
        finished: list[Request] = []
        logprobs, over = results.logprobs, RequestStatus.FINISHED
        num_silent = 0  # rows that draw nothing, or nothing that anybody waits for
        for index, (row, token) in enumerate(zip(plan.rows, results.token_ids, strict=True)):
            request = row[0]
            if request.status is over:
                num_silent += 1
                continue
            if row[4] != row[3]:  # logits of prompt positions
                record_prompt_logprobs(row, logprobs.get(index))
            if not row[3]:  # it draws nothing
                num_silent += 1
                continue
            if token is None:
                raise ValueError(f"request {request.request_id!r}: its row samples and no token came")
            request.num_pending = 0
            output = request.output_token_ids
            output.append(token)
            num_output = len(output)
            if num_output == 1:
                request.first_token_time = now
            if logprobs and index in logprobs:
                record_logprob(request, logprobs[index])
            may_end = num_output >= request.max_output_len or token in request.end_token_ids
            if may_end and ends_with(request, token):
                finished.append(request)
        self._num_generated_tokens += len(plan.rows) - num_silent
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
        return self._num_unfinished - len(self._running) - self._num_leaving

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._admission.num_prefix_queries,
            num_prefix_hits=self._admission.num_prefix_hits,
            num_free_pages=self.pool.num_free,
            num_cached_pages=self.pool.num_cached,
            num_held_pages=self.pool.num_held,
            num_evictions=self.pool.num_evictions,
            num_generated_tokens=self._num_generated_tokens,
        )

    def _leave(self, request: Request) -> None:
        """Its last token is being drawn: it needs no more of any step."""
        self._free(request)
        request.status = RequestStatus.LEAVING
        self._num_leaving += 1

    # -- planning ----------------------------------------------------------------------------------

    def _plan_running(self, request: Request, step: StepDraft) -> None:
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

    def _chunk_len(self, request: Request, step: StepDraft) -> int:
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

    def _plan(self, request: Request, num_tokens: int, step: StepDraft) -> None:
        start = request.num_computed
        stop = start + num_tokens
        num_pages = self.settings.num_pages_for(stop)
        if num_pages > len(request.page_ids):
            request.page_ids += self.pool.allocate(num_pages - len(request.page_ids))
        elif num_pages < len(request.page_ids):  # a plan that was given up had asked for more
            self.pool.release(request.page_ids[num_pages:])
            del request.page_ids[num_pages:]
        samples = stop == request.total_len
        if due := request.num_prompt_logprobs_due:
            num_logits = max(0, stop - max(start, request.prompt_len - 1 - due))
        else:
            num_logits = int(samples)
        self._admission.set_aside(request)
        step.take(PlannedRow(request, start, num_tokens, samples, num_logits, request.page_ids))
        self._admission.claim(request, start, stop, step)

    def _plan_chunk(self, request: Request, step: StepDraft) -> None:
        self._plan(request, self._chunk_len(request, step), step)

    def _preempt(self, request: Request, step: StepDraft) -> None:
        """Take a request's pages and let it wait again; its tokens stay known and are computed anew."""
        self._running.remove(request)
        step.drop(request)
        step.preempted.append(request)
        self._free(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self._num_preemptions += 1
        self._admission.wait(request)

    # -- ends ----------------------------------------------------------------------------------------

    def _free(self, request: Request) -> None:
        self._admission.release(request)
        # A new list: the plan in flight may still be looking at the old one.
        pages, request.page_ids = request.page_ids, []
        self.pool.release(pages)

    def _end(self, request: Request, reason: str, stop_reason: int | str | None, now: float | None) -> None:
        if request.status is RequestStatus.LEAVING:
            self._num_leaving -= 1
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
        self._admission.check_integrity(self._running)
        if self.cache is not None:
            self.cache.check_integrity()
        sources = self._admission.copy_sources()
        holders = [sources.count(page) for page in range(self.settings.num_pages)]
        for request in self._running:
            if request.status is not RequestStatus.RUNNING:
                raise AssertionError(f"{request.request_id} runs but is {request.status}")
            if len(request.page_ids) < self.settings.num_pages_for(request.num_computed):
                raise AssertionError(f"{request.request_id} has computed more than its pages hold")
            for index, page in enumerate(request.page_ids):
                holders[page] += 1
                is_own = self.pool.num_holders(page) == 1 + sources.count(page)
                if index >= request.num_shared_pages and not is_own:
                    raise AssertionError(
                        f"page {page} is writable by {request.request_id} and held by another"
                    )
        if holders != [self.pool.num_holders(page) for page in range(self.settings.num_pages)]:
            raise AssertionError("a page's reference count is not the number of its holders")
        if [*map(self._admission.order, self._running)] != sorted(map(self._admission.order, self._running)):
            raise AssertionError("the running requests are out of order")
        num_known = sum(map(len, self._unfinished.values()))
        num_waiting = self._admission.count_waiting()
        num_running = len(self._running)
        if not num_known == self._num_unfinished == num_waiting + num_running + self._num_leaving:
            raise AssertionError("a request is lost or counted twice")
