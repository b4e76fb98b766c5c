"""Which waiting requests start, with what they find in the prefix cache.

A request is started only into room for what it and all the running ones are known to need. One whose
beginning is being computed by another in this very step is passed over, to find it in a step or two.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable

from engine.page_pool import PagePool
from engine.prefix_cache import PrefixCache
from engine.request import Request, RequestStatus
from engine.scheduler_settings import SchedulerSettings
from engine.step_draft import StepDraft


class Admission:
    """Owns the waiting requests; `cache` is None when prefixes are not shared."""

    def __init__(self, settings: SchedulerSettings, pool: PagePool, cache: PrefixCache | None):
        self._settings = settings
        self._pool = pool
        self._cache = cache
        # A heap; what was aborted while waiting stays until it comes to the top.
        self._waiting: list[tuple[int, int, Request]] = []
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    def order(self, request: Request) -> tuple[int, int]:
        """Who comes first: the lowest."""
        return (request.priority if self._settings.policy == "priority" else 0, request.arrival)

    def wait(self, request: Request) -> None:
        # By age, so a preempted request comes before all that were never admitted.
        heapq.heappush(self._waiting, (*self.order(request), request))

    def count_waiting(self) -> int:
        """The waiting requests, counted one by one."""
        return sum(request.status is RequestStatus.WAITING for *_, request in self._waiting)

    def admit(
        self,
        step: StepDraft,
        running: list[Request],
        plan: Callable[[Request, StepDraft], None],
        now: float | None,
    ) -> None:
        """Start waiting requests, in order, while the step has room and the pages suffice for all.

        A request whose next page is being computed in this very step is passed over: it will find the page
        in a step or two, and then share it. The claim lasts as long as this step's plan, so an owner that is
        preempted or aborted leaves nobody waiting.

        Args:
            running: the running requests in order; those that start are put in their places.
            plan: plans a started request's first tokens in the step, taking pages for them.
        """
        limits = self._settings
        if not self._waiting:
            return
        reserved = sum(map(self._num_pages_to_come, running))
        passed_over: list[Request] = []
        while (
            self._waiting
            and step.tokens_left > 0
            and step.spare_logits > 0
            and len(running) < limits.max_num_seqs
            and len(passed_over) < limits.max_num_seqs  # bounds the work of one step
        ):
            request = heapq.heappop(self._waiting)[-1]
            if request.status is RequestStatus.FINISHED:
                continue
            if request.num_pending:  # preempted by this plan, which was given up: its last token is to come
                passed_over.append(request)
                continue
            readable = self._num_readable_tokens(request)
            pages = self._cache.match(request, readable) if self._cache is not None else []
            if self._is_claimed(request, len(pages), readable, step):
                passed_over.append(request)
                continue
            # Room for its known tokens and a page more, and for the same of everyone running: a request
            # admitted into less would soon be preempted, or preempt.
            num_unheld = sum(not self._pool.is_held(page) for page in pages)
            to_come = self._num_pages_to_come(request) - len(pages)
            if reserved + to_come + num_unheld > self._pool.num_available:
                self.wait(request)
                break
            self._start(request, pages, readable, now)
            insort(running, request, key=self.order)
            step.spare_logits -= 1
            plan(request, step)
            reserved += self._num_pages_to_come(request)
        for request in passed_over:
            self.wait(request)

    def claim(self, request: Request, start: int, stop: int, step: StepDraft) -> None:
        """Note which pages the step computes by planning tokens [start, stop), so that nobody else does.

        Every page that the tokens touch and that will be filled from tokens known now: the one the chunk
        ends in is the request's next chunk.
        """
        if self._cache is not None and self._waiting:
            page_size = self._settings.page_size
            last = min(self._settings.num_pages_for(stop), request.num_tokens // page_size)
            step.claims.update(self._cache.hashes(request, last)[start // page_size : last])

    def _start(self, request: Request, pages: list[int], readable: int, now: float | None) -> None:
        self._pool.share(pages)
        request.page_ids = pages
        request.num_shared_pages = len(pages)
        request.num_computed = len(pages) * self._settings.page_size
        request.status = RequestStatus.RUNNING
        if request.num_preemptions == 0:
            request.first_scheduled_time = now
            request.num_cached_tokens = request.num_computed
            if readable:
                self.num_prefix_queries += request.prompt_len
                self.num_prefix_hits += request.num_computed

    def _num_readable_tokens(self, request: Request) -> int:
        """Most tokens the request may take from the prefix cache: a logit has to come out of the last token,
        and one out of each prompt position whose log-probability is due."""
        if self._cache is None:
            return 0
        if due := request.num_prompt_logprobs_due:
            return request.prompt_len - 1 - due
        return request.num_tokens - 1

    def _is_claimed(self, request: Request, num_found: int, readable: int, step: StepDraft) -> bool:
        if self._cache is None or not step.claims or (num_found + 1) * self._settings.page_size > readable:
            return False
        return self._cache.hashes(request, num_found + 1)[num_found] in step.claims

    def _num_pages_to_come(self, request: Request) -> int:
        """Pages the request lacks for its known tokens and one page more (or its end)."""
        num_tokens = min(request.num_tokens + self._settings.page_size, request.max_total_len)
        return max(0, self._settings.num_pages_for(num_tokens) - len(request.page_ids))
