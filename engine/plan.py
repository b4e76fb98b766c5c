"""What the scheduler decides about one step and what it is told back: plain data, no arrays.

Rows are named tuples rather than frozen dataclasses: a step makes hundreds of them, and a tuple costs a
quarter of the time to make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from engine.request import Request, TopLogprobs


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
    log-probabilities are due, then the drawn token's. 0 for a plain chunk, 1 for a decode row."""
    page_ids: Sequence[int]
    """Pages covering [0, start + num_tokens); the request's own list, to be read only until the next step is
    planned."""

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def num_prompt_logprobs(self) -> int:
        """Prompt positions [stop - num_logits, ...) this row must report, one entry each."""
        return self.num_logits - self.samples


class PageCopy(NamedTuple):
    """The first `num_tokens` tokens of page `source` go to page `target` before the step's rows run."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: rows of one token first, then chunks. No rows: nothing to do."""

    rows: tuple[PlannedRow, ...]
    preempted: tuple[Request, ...] = ()
    """Requests whose pages were taken away; they wait again, outputs kept."""
    copies: tuple[PageCopy, ...] = ()
    """No source is a target of another."""

    @property
    def num_tokens(self) -> int:
        return sum([row.num_tokens for row in self.rows])

    @property
    def num_logits(self) -> int:
        return sum([row.num_logits for row in self.rows])


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

    token_ids: Sequence[int | None]
    """One a row of the plan, in its order: the drawn token, None when the row does not sample."""
    logprobs: Mapping[int, RowLogprobs] = MappingProxyType({})
    """By the row's index, of those rows that were asked for any."""
