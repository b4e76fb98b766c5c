"""What tests of the engine's host side share: short requests, and a device that only pretends to compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.plan import RowLogprobs, StepPlan, StepResults
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, SchedulerSettings


def make_request(name: str, prompt: Iterable[int], max_tokens: int = 4, **fields: Any) -> Request:
    prompt = tuple(prompt)
    sampling = fields.pop("sampling", {})
    fields.setdefault("max_total_len", len(prompt) + max_tokens)
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        key=(0, 0),
        **fields,
    )


def make_scheduler(**settings: Any) -> Scheduler:
    defaults = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "page_size": 4,
        "num_pages": 32,
    }
    return Scheduler(SchedulerSettings(**{**defaults, **settings}))


def next_token(token_ids: Sequence[int]) -> int:
    """What the pretended model draws: it depends on all the tokens before, and on nothing else."""
    return 1000 + (sum(token_ids) * 31 + len(token_ids)) % 97


def logprob_at(request: Request, position: int) -> float:
    """The pretended log-probability of a request's token at a position."""
    return -float(position) - request.token_ids(position, position + 1)[0] / 1e4


def pretend(plan: StepPlan, forced: dict[str, int] | None = None) -> StepResults:
    """The results of a step; `forced` names the tokens that some requests draw."""
    token_ids: list[int | None] = []
    logprobs = {}
    for index, row in enumerate(plan.rows):
        request = row.request
        token = None
        if request.is_finished:  # aborted while the step ran, or ended by the step before: nobody looks
            token = 0
        elif row.samples:
            token = (forced or {}).get(request.request_id)
            # The last of them may have been drawn meanwhile, but never more: tokens are told in order.
            token = next_token(request.token_ids(0, row.stop)) if token is None else token
        token_ids.append(token)
        first = row.stop - row.num_logits
        prompt = [
            (logprob_at(request, position + 1), ((position, -1.0),))
            for position in range(first, first + row.num_prompt_logprobs)
        ]
        if (row.samples or prompt) and not request.is_finished:
            logprobs[index] = RowLogprobs(-0.5 if row.samples else None, (), prompt)
    return StepResults(token_ids, logprobs)


def step(scheduler: Scheduler, forced: dict[str, int] | None = None) -> tuple[StepPlan, list[Request]]:
    plan = scheduler.schedule()
    scheduler.check_integrity()
    finished = scheduler.update(plan, pretend(plan, forced))
    scheduler.check_integrity()
    return plan, finished


def overlapped_step(
    scheduler: Scheduler, before: StepPlan | None, forced: dict[str, int] | None = None
) -> tuple[StepPlan, list[Request]]:
    """The engine's order: plan the next step, then take back the one before it; `forced` as in `pretend`."""
    plan = scheduler.schedule()
    scheduler.check_integrity()
    finished = [] if before is None else scheduler.update(before, pretend(before, forced))
    scheduler.check_integrity()
    scheduler.advance(plan)
    scheduler.check_integrity()
    return plan, finished


def run(scheduler: Scheduler, max_steps: int = 1000) -> list[Request]:
    """Steps until nothing is unfinished; the requests in the order they finished."""
    finished: list[Request] = []
    for _ in range(max_steps):
        if not scheduler.has_unfinished:
            return finished
        finished += step(scheduler)[1]
    raise AssertionError(f"requests are unfinished after {max_steps} steps")


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    """(request, start, number of tokens) of each row."""
    return [(row.request.request_id, row.start, row.num_tokens) for row in plan.rows]
