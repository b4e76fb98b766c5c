"""A step on its way: dispatched to the device, its results not yet taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.plan import RowLogprobs, StepResults
from engine.sampler import StepOutputs
from engine.speculation.verification import accepted


class Draws(NamedTuple):
    """What is known of a step's draws before it has run."""

    logit_of_seat: np.ndarray  # i32[num_seats], which row of logits a seat's token is drawn from
    any_logprobs: bool
    """Log-probabilities are wanted of some row."""
    any_history: bool
    """The next draw of some row depends on the token that this step draws, not only on its place; or how many
    it draws is not known before (drafts)."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """What was planned, and outputs that may still be being computed."""

    plan: Any
    """A `StepPlan`, or of several replicas `ReplicaPlans`; `draws` likewise."""
    outputs: StepOutputs
    draws: Any
    dispatched_at: float
    """Monotonic seconds."""

    @property
    def must_end_first(self) -> bool:
        """The next step can only be planned when this one's results are known."""
        return self.draws.any_history


def step_results(step: InFlight, outputs: StepOutputs) -> StepResults:
    """Spread the rows of logits over the rows of the plan. `outputs` holds numpy arrays."""
    plan = step.plan
    arrays, drawn = plan.arrays, np.asarray(outputs.token_ids)
    if not step.draws.any_logprobs and plan.num_logits == plan.num_rows:  # each row has one, which is a draw
        return StepResults(drawn[: plan.num_rows])
    token_ids = np.zeros(plan.num_rows, np.int32)
    if not step.draws.any_logprobs and not plan.drafts:  # then a row of logits is a draw
        token_ids[arrays.samples] = drawn[: plan.num_logits]
        return StepResults(token_ids)
    draft_lens = plan.draft_lens(arrays.seats)
    first_draws = arrays.num_logits.cumsum() - 1 - draft_lens
    token_ids[arrays.samples] = drawn[first_draws[arrays.samples]]
    kept = {
        index: accepted(
            plan.drafts[arrays.seats.item(index)],
            drawn[first_draws[index] : first_draws[index] + draft_lens[index] + 1].tolist(),
        )
        for index in draft_lens.nonzero()[0].tolist()
    }
    if not step.draws.any_logprobs:
        return StepResults(token_ids, accepted=kept)
    logprobs: dict[int, RowLogprobs] = {}
    at = 0
    for index, row in enumerate(plan.rows):
        first, at = at, at + row.num_logits
        sampling = row.request.sampling
        prompt = tuple(
            _logprob(outputs, each, sampling.prompt_logprobs)
            for each in range(first, first + row.num_prompt_logprobs)
        )
        if row.samples and sampling.logprobs is not None:
            logprobs[index] = RowLogprobs(*_logprob(outputs, at - 1, sampling.logprobs), prompt)
        elif prompt:
            logprobs[index] = RowLogprobs(prompt=prompt)
    return StepResults(token_ids, logprobs, kept)


def _logprob(
    outputs: StepOutputs, at: int, num_top: int | None
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability in row `at`, and the `num_top` likeliest alternatives."""
    ids = np.asarray(outputs.top_ids)[at, :num_top].tolist()
    logprobs = np.asarray(outputs.top_logprobs)[at, :num_top].tolist()
    return float(outputs.logprobs[at]), tuple(zip(ids, logprobs, strict=True))
