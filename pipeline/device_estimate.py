"""How long a job takes on chips at the least, and what they cost: its tokens through the roofline."""

from __future__ import annotations

from dataclasses import dataclass

from engine.backends import Backends
from engine.buckets import Bucket, choose_bucket
from engine.device_plan import DevicePlan, buckets_of
from engine.roofline import StepLoad, StepTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be done, in tokens: as `mode=plan` counts it, every row generating all it may."""

    num_sequences: int
    num_prompt_tokens: int
    num_shared_tokens: int
    """Of the prompts' tokens, those that come from the prefix cache."""
    num_generated_tokens: int

    @property
    def mean_prompt(self) -> float:
        return self.num_prompt_tokens / max(1, self.num_sequences)

    @property
    def mean_generated(self) -> float:
        return self.num_generated_tokens / max(1, self.num_sequences)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A declared step when as many sequences as run at once take part, and its least time."""

    bucket: Bucket
    load: StepLoad
    time: StepTime


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEstimate:
    """running: sequences at a time, in a replica. context: tokens that one holds, halfway through."""

    running: int
    context: float
    num_steps: int
    seconds: float
    chip_hours: float
    cost: float | None


def running_sequences(plan: DevicePlan, work: Work | None) -> tuple[int, float]:
    """How many sequences run at once in a replica, and the tokens each holds on average.

    As many as there are pages for at their full length, a shared prefix counted for each; without rows (None)
    sequences are as long as the model lets them be.
    """
    longest, context = plan.max_model_len, plan.max_model_len / 2
    running = plan.config.max_num_seqs
    if work is not None and work.num_sequences:
        longest = max(1, round(work.mean_prompt + work.mean_generated))
        context = work.mean_prompt + work.mean_generated / 2
        running = min(running, -(-work.num_sequences // plan.num_replicas))
    return max(1, min(running, plan.num_tokens // longest)), context


def planned_steps(plan: DevicePlan, work: Work | None) -> list[PlannedStep]:
    """Every step that the engine declares, with its least time."""
    running, context = running_sequences(plan, work)
    roofline = plan.roofline()
    found = []
    for bucket in _buckets(plan):
        load = StepLoad(*bucket, min(running, bucket.num_tokens), context)
        found.append(PlannedStep(bucket, load, roofline.step(load)))
    return found


def estimate(
    plan: DevicePlan, work: Work, *, roofline_share: float, price_per_chip_hour: float | None
) -> DeviceEstimate:
    """Steps in which all running sequences decode, prefill riding along in what room they leave; and steps of
    prefill alone for what they have no room for. Replicas share the work evenly.

    roofline_share: of the roofline's speed, what steps reach; 1 gives the least time there can be.
    """
    running, context = running_sequences(plan, work)
    budget = plan.config.max_num_batched_tokens
    to_prefill = -(-(work.num_prompt_tokens - work.num_shared_tokens) // plan.num_replicas)
    decodes = -(-work.num_generated_tokens // (running * plan.num_replicas))
    riding = min(to_prefill, decodes * (budget - running))
    alone = -(-(to_prefill - riding) // budget)
    seconds = 0.0
    if decodes:
        tokens = running + -(-riding // decodes)
        seconds += decodes * _least_time(plan, tokens, running, running, context)
    if alone:
        prompts = max(1, round(budget / max(1.0, work.mean_prompt)))
        seconds += alone * _least_time(plan, budget, prompts, prompts, work.mean_prompt / 2)
    seconds /= roofline_share
    chip_hours = seconds / 3600 * plan.topology.num_chips
    return DeviceEstimate(
        running=running,
        context=context,
        num_steps=decodes + alone,
        seconds=seconds,
        chip_hours=chip_hours,
        cost=None if price_per_chip_hour is None else chip_hours * price_per_chip_hour,
    )


def _least_time(plan: DevicePlan, num_tokens: int, num_logits: int, running: int, context: float) -> float:
    """Seconds of the declared step that holds so many tokens."""
    num_logits = min(num_logits, plan.config.max_num_seqs)
    bucket = choose_bucket(_buckets(plan), num_tokens, num_logits)
    return plan.roofline().step(StepLoad(*bucket, running, context)).seconds


def _buckets(plan: DevicePlan) -> tuple[Bucket, ...]:
    return buckets_of(plan.config, Backends.choose(plan.config, plan.topology.chip.platform))
