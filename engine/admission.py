"""Which waiting requests start, with what they find in the prefix cache.

A request is started only into room for what it and all the running ones are known to need. One whose
beginning is being computed by another in this very step is passed over, to find it in a step or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from engine.packed_tokens import num_common_tokens
from engine.page_pool import PagePool
from engine.plan import PageCopy
from engine.prefix_cache import PrefixCache, root_hash
from engine.request import Request, RequestStatus
from engine.scheduler_settings import SchedulerSettings
from engine.seat_table import SeatTable
from engine.step_draft import StepDraft
from engine.waiting_queue import WaitingQueue

# Requests of which one step looks up what is known, only to find that they have to wait for what it computes.
MAX_LOOKED_UP = 32


class Admission:
    """Owns the waiting requests; `cache` is None when prefixes are not shared."""

    def __init__(
        self, settings: SchedulerSettings, pool: PagePool, cache: PrefixCache | None, table: SeatTable
    ):
        self._settings = settings
        self._table = table
        self._pool = pool
        self._cache = cache
        self._waiting = WaitingQueue(settings)
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._num_set_aside = 0  # pages, over all running requests
        # For a waiting request, whose prompt begins alike and is being computed, and how many tokens alike.
        self._awaited: dict[Request, tuple[Request, int]] = {}
        # Requests that count the first tokens of a held page as computed, before they are copied.
        self._copies: dict[Request, tuple[int, int]] = {}

    def wait(self, request: Request) -> None:
        self._waiting.push(request)

    def count_waiting(self) -> int:
        """The waiting requests, counted one by one."""
        return sum(request.status is RequestStatus.WAITING for request in self._waiting)

    def admit(
        self,
        step: StepDraft,
        plan: Callable[[Request, StepDraft], None],
        preempt: Callable[[Request, StepDraft], None],
        now: float | None,
    ) -> None:
        """Start waiting requests, in order, while the step has room and the pages suffice for all.

        Under the priority policy one for which there is no seat, or no pages, takes those of running requests
        that it outranks, the last ones first, where that is enough.

        A request whose next page is being computed in this very step is passed over: it will find the page
        in a step or two, and then share or copy it. The claim lasts as long as this step's plan, so an owner
        that is preempted or aborted leaves nobody waiting.

        Args:
            plan: plans a started request's first tokens in the step, taking pages and setting others aside.
            preempt: takes a running request out of the step, and lets it wait.
        """
        limits = self._settings
        if not self._waiting:
            return
        if self._waiting.has_tenants and self._has_seat(step):
            self._waiting.charge_drawn(self._table.running())
        passed_over: list[Request] = []
        num_looked_up = 0
        while (
            self._waiting
            and step.tokens_left > 0
            and (self._has_seat(step) or limits.policy == "priority")
            and len(passed_over) < limits.max_num_seqs  # these two bound the work of one step
            and num_looked_up < MAX_LOOKED_UP
        ):
            request = self._waiting.pop()
            if request.status is RequestStatus.FINISHED:
                self._awaited.pop(request, None)
                continue
            if not self._has_seat(step) and not limits.outranks(request, self._table.last):
                self.wait(request)
                break
            # One with a token to come was preempted by this plan, or by one that was given up.
            if self._still_waits(request) or request.num_pending or request in step.preempted:
                passed_over.append(request)
                continue
            found = self._find(request)
            if self._waits_for_claim(request, found, step):
                num_looked_up += 1
                passed_over.append(request)
                continue
            num_spare = self._num_spare(request, found)
            num_wanted = self._num_wanted(found.pages) if self._table.num_taken else 0
            if num_spare < num_wanted or not self._has_seat(step):
                victims = self._victims(request, found, num_wanted - num_spare)
                for victim in victims:
                    preempt(victim, step)
                    step.spare_logits += 1
                if victims:
                    found = self._find(request)
                    num_spare = self._num_spare(request, found)
                if not victims or num_spare < num_wanted:
                    self.wait(request)
                    break
            if found.num_copied and num_spare == 0 and not self._pool.is_held(found.source):
                found = found._replace(num_copied=0)  # there is no room to hold what would be copied
            self._start(request, found, now)
            step.spare_logits -= 1
            plan(request, step)
        for request in passed_over:
            self.wait(request)

    def _has_seat(self, step: StepDraft) -> bool:
        return step.spare_logits > 0 and self._table.num_taken < self._settings.max_num_seqs

    def _num_spare(self, request: Request, found: _Found) -> int:
        """Pages that would be left once it and everyone running has what it is expected to need: a request
        admitted into less would soon be preempted, or preempt."""
        num_unheld = sum(not self._pool.is_held(page) for page in found.pages)
        to_come = self._num_pages_to_come(request) - len(found.pages)
        return self._pool.num_available - self._num_set_aside - to_come - num_unheld

    def _victims(self, request: Request, found: _Found, num_missing: int) -> list[Request]:
        """The fewest running requests, the last in order first, whose seats and pages are enough for this one
        that outranks them all; none where that cannot be done."""
        victims: list[Request] = []
        if self._settings.policy != "priority":
            return victims
        for victim in reversed(self._table.running()):
            if not self._settings.outranks(request, victim):
                break
            victims.append(victim)
            num_missing -= victim.num_pages_to_come
            num_missing -= sum(
                self._pool.num_holders(page) == 1 and page not in found.pages for page in victim.page_ids
            )
            if num_missing <= 0:
                return victims
        return []

    def set_aside(self, request: Request) -> None:
        """Reckon anew what is set aside for a running request, its pages having changed."""
        num_pages = self._num_pages_to_come(request)
        self._num_set_aside += num_pages - request.num_pages_to_come
        request.num_pages_to_come = num_pages

    def release(self, request: Request) -> None:
        """The request is about to give up its pages: nothing is set aside for it any more, and what they hold
        behind the last full one is made known."""
        if self._waiting.has_tenants:
            self._waiting.charge_drawn((request,))
        self._num_set_aside -= request.num_pages_to_come
        request.num_pages_to_come = 0
        if request in self._copies:  # not dispatched, so its page does not hold what it counts as computed
            source, _ = self._copies.pop(request)
            self._pool.release([source])
        elif self._cache is not None and request.page_ids:
            self._cache.insert_rest(request)

    def copies(self) -> tuple[PageCopy, ...]:
        """The copies that the next step has to make: also those of plans that were given up."""
        return tuple(
            PageCopy(source, request.page_ids[request.num_shared_pages], num_tokens)
            for request, (source, num_tokens) in self._copies.items()
        )

    def copied(self) -> None:
        """All copies are dispatched: their sources may be let go."""
        for source, _ in self._copies.values():
            self._pool.release([source])
        self._copies.clear()

    def copy_sources(self) -> list[int]:
        """Pages that are held to be copied, each as often as it is held."""
        return [source for source, _ in self._copies.values()]

    def check_integrity(self) -> None:
        """Raises AssertionError unless what is set aside is what the running requests still may take."""
        running = self._table.running()
        if self._num_set_aside != sum(request.num_pages_to_come for request in running):
            raise AssertionError("pages are set aside for nobody, or twice")
        for request in running:
            # Reckoned when its pages last changed: its tokens may have come to one page more since.
            if not 0 <= self._num_pages_to_come(request) - request.num_pages_to_come <= 1:
                raise AssertionError(f"{request.request_id} has not the pages set aside that it may take")

    def claim(self, request: Request, start: int, stop: int, step: StepDraft) -> None:
        """Note what the step computes by planning tokens [start, stop), so that nobody else does.

        A page counts with all its tokens that are known now, also those of the request's next chunk.
        """
        if self._cache is None or not self._waiting:
            return
        if start >= request.num_tokens:  # a token that is being drawn: nobody could tell that he wants it
            return
        page_size = self._settings.page_size
        last = self._settings.num_pages_for(stop) - 1
        hashes = self._cache.hashes(request, last)
        for index in range(start // page_size, last + 1):
            stop = min((index + 1) * page_size, request.num_tokens)
            tokens = request.packed_tokens(index * page_size, stop)
            step.claims.add(_prefix_hash(request, hashes, index), tokens, len(step.owners))
        step.owners.append(request)

    def _start(self, request: Request, found: _Found, now: float | None) -> None:
        self._pool.share(found.pages)
        request.page_ids = found.pages
        request.num_shared_pages = len(found.pages)
        request.num_computed = len(found.pages) * self._settings.page_size + found.num_copied
        if found.num_copied:
            self._pool.share([found.source])
            self._copies[request] = (found.source, found.num_copied)
        request.status = RequestStatus.RUNNING
        self._table.take(request)
        if request.num_preemptions == 0:
            self._waiting.charge_start(request)
            request.first_scheduled_time = now
            request.num_cached_tokens = min(request.num_computed, request.prompt_len)
            if found.num_readable:
                self.num_prefix_queries += request.prompt_len
                self.num_prefix_hits += request.num_cached_tokens

    def _find(self, request: Request) -> _Found:
        """What the prefix cache has of the request."""
        if self._cache is None:
            return _Found([], 0, 0, 0, b"")
        readable = self._num_readable_tokens(request)
        pages = self._cache.match(request, readable)
        start = len(pages) * self._settings.page_size
        wanted = request.packed_tokens(start, max(start, min(start + self._settings.page_size, readable)))
        source, num_copied = self._cache.closest(pages, wanted, request.cache_salt) if wanted else (0, 0)
        if not pages and num_copied < self._settings.min_shared_tokens:
            num_copied = 0
        return _Found(pages, source, num_copied, readable, wanted)

    def _num_readable_tokens(self, request: Request) -> int:
        """Most tokens the request may take from the prefix cache: a logit has to come out of the last token,
        and one out of each prompt position whose log-probability is due."""
        if due := request.num_prompt_logprobs_due:
            return request.prompt_len - 1 - due
        return request.num_tokens - 1

    def _waits_for_claim(self, request: Request, found: _Found, step: StepDraft) -> bool:
        """Whether this step computes a page that the request would share, or a good part of one, for somebody
        before it in the order: for one behind it, it might wait long."""
        if not step.claims or not found.wanted:
            return False
        claimed = step.claims.closest(
            _prefix_hash(request, request.page_hashes, len(found.pages)), found.wanted
        )
        if claimed is None:
            return False
        owner, num_claimed = step.owners[claimed[0]], claimed[1]
        limits = self._settings
        is_worth_it = num_claimed >= min(limits.page_size, found.num_copied + limits.min_shared_tokens)
        if not is_worth_it or limits.rank(owner) > limits.rank(request):
            return False
        num_common = num_common_tokens(request.packed_prompt, owner.packed_prompt)
        self._awaited[request] = (owner, num_common)
        return True

    def _still_waits(self, request: Request) -> bool:
        """Whether the one that the request waits for has yet to compute tokens that both begin with."""
        owner, num_common = self._awaited.get(request, (None, 0))
        if owner is None:
            return False
        if owner.status is RequestStatus.RUNNING and owner.num_computed < num_common:
            return True
        del self._awaited[request]
        return False

    def _num_wanted(self, found: list[int]) -> int:
        """Cached pages to leave alone as long as others run, because requests to come are known to want them.

        At most half of the pool: pins must not keep the requests from running side by side.
        """
        num_pinned = self._pool.num_cached_pinned
        if num_pinned:
            num_pinned -= sum(self._pool.is_cached_pinned(page) for page in found)
        return min(num_pinned, self._settings.num_pages // 2)

    def _num_pages_to_come(self, request: Request) -> int:
        """Pages the request lacks for what it is expected to come to, or, where that is unknown, for its
        prompt and a page more; one at least, up to its end. Between two changes of its pages this stays the
        same."""
        limits, held = self._settings, len(request.page_ids)
        expected = max(request.total_len, request.prompt_len + limits.page_size, request.expected_len or 0)
        most = limits.num_pages_for(request.max_total_len)
        return min(max(limits.num_pages_for(expected), held + 1), most) - held


class _Found(NamedTuple):
    """What the prefix cache has of a request."""

    pages: list[int]
    source: int
    """The page that continues them most like the request does."""
    num_copied: int
    """Its tokens that are to be copied; 0 for none."""
    num_readable: int
    """Most tokens that the request may take."""
    wanted: bytes
    """Tokens behind the pages, up to a page of them, that it would take too, packed; none with no cache."""


def _prefix_hash(request: Request, hashes: list[bytes], num_pages: int) -> bytes:
    """The hash of the request's first pages, given those of each."""
    return hashes[num_pages - 1] if num_pages else root_hash(request.cache_salt)
