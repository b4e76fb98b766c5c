"""Rows of a step that end in guesses: how a scheduler plans them, and what it counts when they come back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.page_pool import PagePool
from engine.plan import PlannedRow, StepPlan
from engine.prefix_cache import PrefixCache
from engine.request import Request
from engine.scheduler_settings import SchedulerSettings
from engine.seat_table import SeatTable
from engine.speculation.drafter import Drafter
from engine.step_draft import StepDraft


class DraftRows:
    """The part of one scheduler that plans drafts.

    hold: has a request hold the pages for its first tokens, as many as are said.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        table: SeatTable,
        pool: PagePool,
        cache: PrefixCache | None,
        hold: Callable[[Request, int], None],
    ):
        self._page_size = settings.page_size
        self._table = table
        self._pool = pool
        self._cache = cache
        self._hold = hold
        self.drafter = Drafter(settings)

    @property
    def needs_tokens(self) -> bool:
        """Whether the next plan guesses what follows the tokens that the step in flight draws."""
        return self.drafter.budget(self._table.num_taken, 1) > 0

    @property
    def num_drafted(self) -> int:
        return self.drafter.num_drafted

    @property
    def num_accepted(self) -> int:
        return self.drafter.num_accepted

    def plan(
        self, decodes: np.ndarray, step: StepDraft, now: float | None, in_flight: StepPlan | None
    ) -> dict[int, list[int]]:
        """Take decodes (seats) with guesses behind their tokens into the step, where all else leaves room;
        the guesses by seat.

        Raises ValueError when the step in flight has drafts: how far its rows have come is not known yet.
        """
        if in_flight is not None and in_flight.drafts:
            raise ValueError("the step in flight has drafts: what follows it is known when it is updated")
        self.drafter.planned(now)
        drafts: dict[int, list[int]] = {}
        if step.preempted:  # pages are short
            return drafts
        table, num_rows = self._table, len(decodes)
        left = self.drafter.budget(num_rows, min(step.tokens_left, step.spare_logits))
        if left < 1:
            return drafts
        for seat in decodes[table.num_pending[decodes] == 0].tolist():
            request = table.requests[seat]
            draft = self.drafter.draft(request, num_rows, min(left, self._room(request)))
            if draft:
                drafts[seat] = draft
                self._take(request, draft, step)
                left -= len(draft)
                if left < 1:
                    break
        return drafts

    def _room(self, request: Request) -> int:
        """Most guesses for a request: never past its end, in pages that it holds or that are set aside for it
        and free. Rejected guesses lie there until its own tokens come to those places."""
        num_pages = len(request.page_ids) + min(request.num_pages_to_come, self._pool.num_available)
        most = min(num_pages * self._page_size, request.max_computed_len)
        return max(0, most - request.num_tokens)

    def _take(self, request: Request, draft: list[int], step: StepDraft) -> None:
        start, num_tokens = request.num_computed, 1 + len(draft)
        self._hold(request, start + num_tokens)
        self._table.write_draft(request.seat, draft)
        step.extend(PlannedRow(request, start, num_tokens, True, num_tokens, request.page_ids, draft))

    def update(self, plan: StepPlan, now: float | None) -> None:
        """The step's tokens are recorded: what was guessed right counts as computed too, and a page that it
        fills becomes known, as it is now."""
        arrays, outcomes = plan.arrays, []
        if plan.drafts:
            for seat, ticket in zip(arrays.seats.tolist(), arrays.tickets.tolist(), strict=True):
                if seat in plan.drafts and self._table.tickets[seat] == ticket:
                    request = self._table.requests[seat]
                    outcomes.append((request, len(plan.drafts[seat]), self._accept(request)))
        num_draws = plan.num_rows + sum(map(len, plan.drafts.values()))
        only_draws = num_draws == plan.num_tokens == plan.num_logits
        self.drafter.took(plan.num_rows, only_draws, outcomes, now)

    def _accept(self, request: Request) -> int:
        """Of its known tokens all but the last are computed; how many of them were guessed."""
        table, seat = self._table, request.seat
        start, stop = table.num_computed.item(seat), table.num_tokens.item(seat) - 1
        table.num_computed[seat] = stop
        fills_page = stop // self._page_size > start // self._page_size
        if fills_page and self._cache is not None and self._cache.insert(request):
            table.write_pages(request)
        return stop - start
