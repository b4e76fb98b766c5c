"""What the scheduler decides about one step and what it is told back: plain data.

A step has hundreds of rows, most of them alike. So a plan holds their numbers as arrays, one entry a row, and
makes a `PlannedRow` of them only for who asks for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from engine.request import Request, TopLogprobs
from engine.seat_table import SeatTable


class PlannedRow(NamedTuple):
    """One request's part of a step: tokens [start, start + num_tokens) are computed."""

    request: Request
    start: int
    """Tokens of it that steps before this one compute."""
    num_tokens: int
    samples: bool
    """The last token is in the range, so a new token is drawn from its logits. That last token may itself be
    one that the step in flight draws."""
    num_logits: int
    """The logits of the row's LAST `num_logits` tokens are needed: those of the prompt positions whose
    log-probabilities are due, then the drawn token's, then those of drafted tokens. 0 for a plain chunk, 1
    for a decode row."""
    page_ids: Sequence[int]
    """Pages covering [0, start + num_tokens); the request's own list, to be read only until the next step is
    planned."""
    draft: Sequence[int] = ()
    """The row's last tokens, if they are guesses (engine/speculation): a token is drawn behind each of them
    too, so its logits are needed."""

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def num_prompt_logprobs(self) -> int:
        """Prompt positions [stop - num_logits, ...) this row must report, one entry each."""
        return self.num_logits - self.samples - len(self.draft)


class PageCopy(NamedTuple):
    """The first `num_tokens` tokens of page `source` go to page `target` before the step's rows run."""

    source: int
    target: int
    num_tokens: int


class RowArrays(NamedTuple):
    """The rows of a step, an entry each: the fields of `PlannedRow`, and where the request's numbers are."""

    requests: Any  # object[R], of Request
    seats: np.ndarray  # i64[R]
    tickets: np.ndarray  # i64[R], of the seats when the step was planned
    starts: np.ndarray  # i32[R]
    lens: np.ndarray  # i32[R]
    samples: np.ndarray  # bool[R]
    num_logits: np.ndarray  # i32[R]
    is_pending: np.ndarray  # bool[R], the row's one token is drawn by the step in flight

    def take(self, order: np.ndarray) -> RowArrays:
        """The rows in another order, or some of them."""
        return RowArrays(*[array[order] for array in self])

    def where(self, mask: np.ndarray) -> RowArrays:
        """Those of the rows for which bool[R] is true: mostly all."""
        return self if np.count_nonzero(mask) == len(mask) else self.take(mask)


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step: rows of one token first, then chunks. No rows: nothing to do."""

    table: SeatTable
    """The numbers of the running requests, to be read only until the next step is planned."""
    arrays: RowArrays
    num_tokens: int
    num_logits: int
    preempted: tuple[Request, ...] = ()
    """Requests whose pages were taken away; they wait again, outputs kept."""
    copies: tuple[PageCopy, ...] = ()
    """No source is a target of another."""
    drafts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """By seat, the guesses that end its row. Such a step's results are to be known before the next is
    planned."""

    @classmethod
    def of(
        cls,
        table: SeatTable,
        decodes: np.ndarray,
        rows: Sequence[PlannedRow],
        preempted: Sequence[Request] = (),
        copies: Sequence[PageCopy] = (),
        drafts: Mapping[int, Sequence[int]] = MappingProxyType({}),
    ) -> StepPlan:
        """A step of seats whose requests compute their one token left, and then of rows of any kind."""
        seats = np.concatenate((decodes, [row.request.seat for row in rows])) if rows else decodes
        lens, num_logits = np.ones((2, len(seats)), np.int32)
        samples = np.ones(len(seats), bool)
        for index, row in enumerate(rows, len(decodes)):
            lens[index], samples[index], num_logits[index] = row.num_tokens, row.samples, row.num_logits
        arrays = RowArrays(
            requests=table.requests[seats],
            seats=seats,
            tickets=table.tickets[seats],
            starts=table.num_computed[seats],
            lens=lens,
            samples=samples,
            num_logits=num_logits,
            is_pending=table.num_pending[seats] > 0,
        )
        num_tokens = len(decodes) + sum([row.num_tokens for row in rows])
        num_drawn = len(decodes) + sum([row.num_logits for row in rows])
        return cls(table, arrays, num_tokens, num_drawn, tuple(preempted), tuple(copies), drafts)

    @property
    def rows(self) -> tuple[PlannedRow, ...]:
        """The rows, made one by one."""
        return tuple(map(self.row, range(self.num_rows)))

    def row(self, index: int) -> PlannedRow:
        arrays = self.arrays
        request = arrays.requests[index]
        return PlannedRow(
            request,
            arrays.starts.item(index),
            arrays.lens.item(index),
            arrays.samples.item(index),
            arrays.num_logits.item(index),
            request.page_ids,
            self.drafts.get(arrays.seats.item(index), ()) if self.drafts else (),
        )

    def draft_lens(self, seats: np.ndarray) -> np.ndarray:
        """i32[len(seats)]: the drafted tokens of each seat's row."""
        lens = np.zeros(len(seats), np.int32)
        if self.drafts:
            lens[:] = [len(self.drafts.get(seat, ())) for seat in seats.tolist()]
        return lens

    @property
    def num_rows(self) -> int:
        return len(self.arrays.seats)

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and rows of logits: what a compiled step must hold."""
        return self.num_tokens, self.num_logits

    @property
    def drawing(self) -> list[Request]:
        """The requests that a token is drawn for, in order."""
        return self.arrays.requests[self.arrays.samples].tolist()


class RowLogprobs(NamedTuple):
    """The log-probabilities that one row was asked for."""

    logprob: float | None = None
    """The drawn token's; None when it was not asked for."""
    top: TopLogprobs = ()
    """The likeliest alternatives to it."""
    prompt: Sequence[tuple[float, TopLogprobs]] = ()
    """`num_prompt_logprobs` entries: the log-probability of the prompt token at the next position, and the
    likeliest alternatives there."""


class StepResults(NamedTuple):
    """What the device says about one step."""

    token_ids: Sequence[int | None] | np.ndarray
    """One a row of the plan, in its order: the drawn token, the first one behind the tokens that were known;
    anything when the row does not sample."""
    logprobs: Mapping[int, RowLogprobs] = MappingProxyType({})
    """By the row's index, of those rows that were asked for any."""
    accepted: Mapping[int, Sequence[int]] = MappingProxyType({})
    """By the row's index, of rows with a draft: the tokens that were drawn as guessed, and the one behind
    them, without the first."""
