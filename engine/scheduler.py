"""Which tokens of which requests the next step computes.

There are no phases. A request has `num_tokens` known tokens of which `num_computed` have their keys
and values in pages; every step moves the second toward the first, under one budget of tokens. A long
prompt in chunks, a decode, a prefix found in the cache and a request that was preempted are all that.

Order is by age (fcfs) or by priority and then age, of which enough outweighs a priority
(`SchedulerSettings.rank`). A request's pages can be taken by those before it in this order, never by those
after: so the first one always advances, and every admitted request finishes.

What a step does to all rows alike is done at once, on the arrays of `SeatTable`; only rows to which something
happens are looked at one by one.
"""

from __future__ import annotations

import numpy as np

from engine.admission import Admission
from engine.errors import RequestError
from engine.page_pool import PagePool
from engine.plan import PlannedRow, StepPlan, StepResults
from engine.prefix_cache import HashPage, PrefixCache, page_hash
from engine.request import Request, RequestStatus
from engine.scheduler_settings import SchedulerSettings, SchedulerStats
from engine.seat_table import SeatTable
from engine.speculation.draft_rows import DraftRows
from engine.step_draft import StepDraft
from engine.step_results import drawn_tokens, record

__all__ = ["Scheduler", "SchedulerSettings", "SchedulerStats"]


class Scheduler:
    """Owns the unfinished requests and their pages. One thread.

    A step is `schedule`, `advance` when it is dispatched, and `update` with its results. One step may be in
    flight, dispatched and not updated, while the next is planned; before it is advanced, that one is updated.

    hash_page: how the prefix cache hashes a page; only tests give another one, to force collisions.
    """

    def __init__(self, settings: SchedulerSettings, hash_page: HashPage = page_hash):
        self.settings = settings
        self.pool = PagePool(settings.num_pages, settings.max_cached_pages)
        self.cache = (
            PrefixCache(settings.page_size, self.pool, hash_page) if settings.enable_prefix_caching else None
        )
        self._table = SeatTable(
            settings.max_num_seqs, settings.max_model_len, settings.page_size, settings.rank
        )
        self._admission = Admission(settings, self.pool, self.cache, self._table)
        self._draft_rows = (
            None
            if settings.speculation == "off"
            else DraftRows(settings, self._table, self.pool, self.cache, self._hold)
        )
        # By request id, then by sample index.
        self._unfinished: dict[str, dict[int, Request]] = {}
        self._num_unfinished = 0
        self._next_arrival = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_leaving = 0
        self._num_generated_tokens = 0
        self._advanced: StepPlan | None = None

    # -- requests come and go ----------------------------------------------------------------------

    def add(self, request: Request, now: float | None = None) -> None:
        """Queue a new request. Raises RequestError when it could never run, with the numbers."""
        limits = self.settings
        is_new = request.status is RequestStatus.WAITING and request.num_output_tokens == request.num_given
        if not is_new or request.num_computed:
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
        request.arrival_step = self._num_steps
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

    def forget_prefixes(self) -> None:
        """Give up what the prefix cache holds beyond the pages of running requests."""
        self.pool.evict_all()

    # -- one step ----------------------------------------------------------------------------------

    def schedule(self, now: float | None = None) -> StepPlan:
        """Decide the next step. The rows are valid until `advance`, or until the next `schedule`.

        Running requests come first: those with one token left (decodes), then the rest, each in order.
        Waiting ones are admitted into what is left of the budget, unless pages just ran out; more urgent ones
        also into the places of running ones.
        """
        table, page_size = self._table, self.settings.page_size
        self._num_steps += 1
        order = table.order
        has_one_left = table.has_one_left(order)
        decodes, rest = order, order[:0]
        if np.count_nonzero(has_one_left) < len(order):
            decodes, rest = order[has_one_left], order[~has_one_left]
        tickets = table.tickets[decodes]
        step = StepDraft(self.settings, table.num_taken, len(decodes))
        at_new_page = table.num_computed[decodes] % page_size == 0
        eventful = [(request, self._plan_decode) for request in table.requests[decodes[at_new_page]].tolist()]
        eventful += [(request, self._plan_running) for request in table.requests[rest].tolist()]
        for request, plan in eventful:
            if request.status is RequestStatus.RUNNING:  # it may have lost its place to one before it
                plan(request, step)
        if not step.preempted:
            self._admission.admit(step, self._plan_chunk, self._preempt, now)
        if step.preempted:  # a seat may have gone to another since
            decodes = decodes[table.tickets[decodes] == tickets]
        drafts = {}
        if self._draft_rows is not None:
            drafts = self._draft_rows.plan(decodes, step, now, self._advanced)
            decodes = decodes[~np.isin(decodes, list(drafts))] if drafts else decodes
        rows = (*step.singles, *step.chunks)
        return StepPlan.of(table, decodes, rows, step.preempted, self._admission.copies(), drafts)

    def advance(self, plan: StepPlan) -> None:
        """The plan is dispatched: what it computes counts as computed, what it draws is pending.

        Steps run in the order of their dispatch. So from here on a page that the plan fills may be read by
        the steps to come, and one that it only writes to for a request that has ended meanwhile may be
        given to another: they write after it. A request whose last token is being drawn leaves at once.

        Requests that were finished since `schedule` are passed over. Raises ValueError when the plan is not
        the last one.
        """
        table, arrays = self._table, plan.arrays
        is_live = table.tickets[arrays.seats] == arrays.tickets
        if np.count_nonzero(is_live) < len(is_live):
            for request in arrays.requests[~is_live].tolist():
                if request.status is not RequestStatus.FINISHED:
                    raise _not_the_last(request)
            arrays = arrays.take(is_live)
        seats, samples = arrays.seats, arrays.samples
        has_moved = table.num_computed[seats] != arrays.starts
        if np.count_nonzero(has_moved):
            raise _not_the_last(arrays.requests[has_moved][0])
        self._admission.copied()
        self._advanced = plan
        # Of a drafted row only the token that was known counts, until it is seen which guesses are right.
        lens = arrays.lens - plan.draft_lens(seats) if plan.drafts else arrays.lens
        stops = arrays.starts + lens
        table.num_computed[seats] = stops
        table.num_pending[seats] = samples
        # All of these tokens are known: only the last of a request can be pending, and that is not computed
        # before the step after the one that draws it.
        page_size = self.settings.page_size
        fills_page = stops // page_size > arrays.starts // page_size
        ends_chunk = samples & (lens > 1)
        leaves = samples & (stops >= table.max_computed_lens[seats])
        for index in (fills_page | ends_chunk | leaves).nonzero()[0].tolist():
            request = arrays.requests[index]
            if self.cache is not None and fills_page[index] and self.cache.insert(request):
                table.write_pages(request)
            if self.cache is not None and ends_chunk[index]:
                self.cache.insert_rest(request)
            if leaves[index]:
                self._leave(request)

    def update(self, plan: StepPlan, results: StepResults, now: float | None = None) -> list[Request]:
        """Record what a step drew; returns the requests that ended with it, their pages freed.

        A plan that was not dispatched before (`advance`) is taken as such here. Requests that were finished
        or aborted since are passed over; those preempted since keep their token. Raises ValueError when the
        results do not belong to the plan.
        """
        token_ids = drawn_tokens(plan, results)
        if self._advanced is not plan:
            self.advance(plan)
        self._advanced = None
        finished, num_drawn = record(plan, token_ids, results, now)
        self._num_generated_tokens += num_drawn
        if self._draft_rows is not None:
            self._draft_rows.update(plan, now)
        for request in finished:
            self._end(request, request.finish_reason or "stop", request.stop_reason, now)
        return finished

    @property
    def needs_tokens(self) -> bool:
        """Whether the next plan guesses what follows the tokens that the step in flight draws."""
        return self._draft_rows is not None and self._draft_rows.needs_tokens

    @property
    def has_unfinished(self) -> bool:
        return self._num_unfinished > 0

    @property
    def num_unfinished(self) -> int:
        return self._num_unfinished

    @property
    def num_running(self) -> int:
        return self._table.num_taken

    @property
    def num_waiting(self) -> int:
        return self._num_unfinished - self._table.num_taken - self._num_leaving

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
            num_drafted_tokens=0 if self._draft_rows is None else self._draft_rows.num_drafted,
            num_accepted_tokens=0 if self._draft_rows is None else self._draft_rows.num_accepted,
        )

    def _leave(self, request: Request) -> None:
        """Its last token is being drawn: it needs no more of any step."""
        self._free(request)
        request.status = RequestStatus.LEAVING
        self._num_leaving += 1

    # -- planning ----------------------------------------------------------------------------------

    def _plan_decode(self, request: Request, step: StepDraft) -> None:
        """Give the request the page that its one token left begins; its row is made with all decodes'."""
        stop = request.num_computed + 1
        if self._make_room(request, stop, step):
            self._hold(request, stop)
            self._admission.claim(request, stop - 1, stop, step)

    def _plan_running(self, request: Request, step: StepDraft) -> None:
        """Plan the next tokens of a request that has more than one left."""
        num_tokens = self._chunk_len(request, step)
        if num_tokens >= 1 and self._make_room(request, request.num_computed + num_tokens, step):
            self._plan(request, num_tokens, step)

    def _make_room(self, request: Request, stop: int, step: StepDraft) -> bool:
        """See that there are pages for [0, stop), taking them from those after it when there are none left;
        False when it is itself the last one and had to go."""
        missing = self.settings.num_pages_for(stop) - len(request.page_ids)
        while missing > self.pool.num_available:
            victim = self._table.last
            self._preempt(victim, step)
            if victim is request:
                return False
        return True

    def _hold(self, request: Request, stop: int) -> None:
        """Hold exactly the pages for [0, stop)."""
        num_pages = self.settings.num_pages_for(stop)
        if num_pages > len(request.page_ids):
            request.page_ids += self.pool.allocate(num_pages - len(request.page_ids))
        elif num_pages < len(request.page_ids):  # a plan that was given up had asked for more
            self.pool.release(request.page_ids[num_pages:])
            del request.page_ids[num_pages:]
        self._table.write_pages(request)
        self._admission.set_aside(request)

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
        self._hold(request, stop)
        samples = stop == request.total_len
        if due := request.num_prompt_logprobs_due:
            num_logits = max(0, stop - max(start, request.prompt_len - 1 - due))
        else:
            num_logits = int(samples)
        step.take(PlannedRow(request, start, num_tokens, samples, num_logits, request.page_ids))
        self._admission.claim(request, start, stop, step)

    def _plan_chunk(self, request: Request, step: StepDraft) -> None:
        self._plan(request, self._chunk_len(request, step), step)

    @property
    def tables(self) -> list[SeatTable]:
        """Where the numbers of the running requests are."""
        return [self._table]

    def preempt_all(self) -> None:
        """Let all running requests wait again, their pages freed: no step may be in flight."""
        for request in self._table.running():
            self._requeue(request)

    def _preempt(self, request: Request, step: StepDraft) -> None:
        """Take a request out of a step and let it wait again."""
        step.drop(request)
        step.preempted.append(request)
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        """Take a request's pages and let it wait again; its tokens stay known and are computed anew."""
        self._free(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self._num_preemptions += 1
        self._admission.wait(request)

    # -- ends ----------------------------------------------------------------------------------------

    def _free(self, request: Request) -> None:
        self._admission.release(request)
        if request.status is RequestStatus.RUNNING:
            self._table.release(request)
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
        if self._draft_rows is not None:
            self._draft_rows.drafter.ended(request)
        siblings = self._unfinished[request.request_id]
        del siblings[request.sample_index]
        if not siblings:
            del self._unfinished[request.request_id]
        self._num_unfinished -= 1

    def check_integrity(self) -> None:
        """Raises AssertionError unless pages, holders and requests add up, as between any two operations."""
        self.pool.check_integrity()
        self._table.check_integrity()
        self._admission.check_integrity()
        if self.cache is not None:
            self.cache.check_integrity()
        sources = self._admission.copy_sources()
        holders = [sources.count(page) for page in range(self.settings.num_pages)]
        for request in self._table.running():
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
        num_known = sum(map(len, self._unfinished.values()))
        num_waiting = self._admission.count_waiting()
        num_running = self._table.num_taken
        if not num_known == self._num_unfinished == num_waiting + num_running + self._num_leaving:
            raise AssertionError("a request is lost or counted twice")


def _not_the_last(request: Request) -> ValueError:
    return ValueError(f"the plan is not the last one: request {request.request_id!r} has moved since")
