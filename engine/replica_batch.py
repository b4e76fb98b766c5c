"""A step's inputs and results where several replicas run their batches in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from engine.batch import BatchBuilder
from engine.buckets import Bucket
from engine.in_flight import Draws, InFlight, step_results
from engine.page_copies import PageCopier
from engine.plan import PageCopy, StepResults
from engine.prefix_groups import Branch
from engine.replicas import ReplicaPlans
from engine.sampler import StepOutputs
from engine.step_inputs import StepArrays, StepShape


class ReplicaDraws(NamedTuple):
    """The `Draws` of each replica."""

    each: tuple[Draws, ...]

    @property
    def any_logprobs(self) -> bool:
        return any(draws.any_logprobs for draws in self.each)

    @property
    def any_history(self) -> bool:
        return any(draws.any_history for draws in self.each)


class HostStep(NamedTuple):
    """What the host knows of a step: all that a process needs to run it which ran those before it."""

    bucket: Bucket
    copies: Sequence[Sequence[PageCopy]]
    """By replica; empty when there are none."""
    continues: bool
    """It reads tokens of the step before on the device."""
    numbers: np.ndarray
    unusual: dict[str, np.ndarray]
    """As in `Filled`, with one entry a replica along a first axis."""


class ReplicaBatch:
    """What `BatchBuilder` is for one batch: every array has one entry a replica along a first axis.

    sharding: where the arrays are put (on every chip).
    """

    announce: Callable[[HostStep], None] | None = None
    """Called with each step before it runs, where other processes run it too."""

    def __init__(self, builders: Sequence[BatchBuilder], sharding: Any):
        self._builders = builders
        self._sharding = sharding
        self._nothing_drawn: Any = None
        self._idle: dict[int, dict[str, Any]] = {}

    def shape(self, bucket: Bucket) -> StepShape:
        """Of each replica's batch."""
        return self._builders[0].shape(bucket)

    def arrange(self, plan: ReplicaPlans) -> tuple[ReplicaPlans, list[list[Branch]]]:
        pairs = zip(self._builders, plan.each, strict=True)
        plans, branches = zip(*(builder.arrange(each) for builder, each in pairs), strict=True)
        return ReplicaPlans(plans), list(branches)

    def build(
        self,
        plan: ReplicaPlans,
        branches: Sequence[Sequence[Branch]],
        bucket: Bucket,
        before: InFlight | None,
    ) -> tuple[StepArrays, ReplicaDraws]:
        drawn_before = [None] * len(self._builders) if before is None else before.draws.each
        parts = zip(self._builders, plan.each, branches, drawn_before, strict=True)
        filled = [builder.fill(each, shared, bucket, draws) for builder, each, shared, draws in parts]
        numbers = np.stack([each.numbers for each in filled])
        names = sorted(set().union(*(each.unusual for each in filled)))
        idle = self._builders[0].idle_rows(bucket.num_logits) if names else {}
        unusual = {name: np.stack([each.unusual.get(name, idle[name]) for each in filled]) for name in names}
        step = HostStep(bucket, plan.copies, before is not None, numbers, unusual)
        if self.announce is not None:
            self.announce(step)
        arrays = self.arrays(step, None if before is None else before.outputs.token_ids)
        return arrays, ReplicaDraws(tuple(each.draws for each in filled))

    def arrays(self, step: HostStep, drawn: Any) -> StepArrays:
        """What the compiled step is given. `drawn`: the tokens of the step in flight, on the devices.

        Arrays that are the step's own go to the devices with its call.
        """
        drawn = drawn if step.continues else self._drawn_by_nobody()
        rest: dict[str, Any] = self._idle_arrays(step.bucket.num_logits) | step.unusual
        return StepArrays(numbers=step.numbers, drawn=drawn, **rest)

    def idle_arrays(self, bucket: Bucket) -> StepArrays:
        """Inputs of a step with no rows: the shapes to compile for."""
        numbers = [builder.fill(builder.idle_plan(), (), bucket, None).numbers for builder in self._builders]
        return self.arrays(HostStep(bucket, (), False, np.stack(numbers), {}), None)

    def results(self, step: InFlight, outputs: StepOutputs) -> tuple[StepResults, ...]:
        """Each replica's results. `outputs` holds numpy arrays, of log-probabilities where there are any."""
        results = []
        for index, (plan, draws) in enumerate(zip(step.plan.each, step.draws.each, strict=True)):
            own = outputs._replace(token_ids=outputs.token_ids[index])
            if draws.any_logprobs:
                own = StepOutputs(*(array[index] for array in outputs))
            results.append(step_results(InFlight(plan, own, draws, step.dispatched_at), own))
        return tuple(results)

    def _drawn_by_nobody(self) -> Any:
        if self._nothing_drawn is None:
            drawn = np.stack([builder.nothing_drawn for builder in self._builders])
            self._nothing_drawn = jax.device_put(drawn, self._sharding)
        return self._nothing_drawn

    def _idle_arrays(self, size: int) -> dict[str, Any]:
        if size not in self._idle:
            rows = self._builders[0].idle_rows(size)
            stacked = {name: np.stack([array] * len(self._builders)) for name, array in rows.items()}
            self._idle[size] = jax.device_put(stacked, self._sharding)
        return self._idle[size]


class ReplicaPageCopier(PageCopier):
    """Copies of each replica's pages, in one call."""

    def _arrays(self, copies: Sequence[Sequence[PageCopy]]) -> tuple[np.ndarray, ...]:
        each = copies or [()] * self._num_replicas
        arrays, counts = zip(*(super(ReplicaPageCopier, self)._arrays(own) for own in each), strict=True)
        return np.stack(arrays), np.stack(counts)
