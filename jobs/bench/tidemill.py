"""Runs workloads on this project's own engine."""

from __future__ import annotations

import time
from typing import Any

from engine.engine import Engine
from engine.sampling_params import SamplingParams
from jobs.bench.measurement import Measurement, percentiles
from jobs.bench.workloads import Workload


class TidemillRunner:
    """One engine for all repeats: made and compiled once."""

    name = "tidemill"

    def __init__(self, source: str, **options: Any):
        started = time.perf_counter()
        self._engine = Engine.from_pretrained(source, **options)
        self.start_seconds = time.perf_counter() - started
        self.compile_seconds = self._engine.stats().compile_seconds

    @property
    def engine(self) -> Engine:
        return self._engine

    def run(self, workload: Workload) -> Measurement:
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True) for num in workload.max_tokens
        ]
        before = self._engine.stats()
        started = time.perf_counter()
        outputs = self._engine.generate([list(prompt) for prompt in workload.prompts], sampling)
        seconds = time.perf_counter() - started
        after = self._engine.stats()
        num_prompt = after.num_prompt_tokens - before.num_prompt_tokens
        num_cached = after.num_cached_tokens - before.num_cached_tokens
        num_padded = after.num_padded_tokens - before.num_padded_tokens
        num_computed = after.num_computed_tokens - before.num_computed_tokens
        return Measurement(
            self.name,
            seconds,
            tuple(output.outputs[0].token_ids for output in outputs),
            {
                "num_steps": after.num_steps - before.num_steps,
                "step_ms": percentiles([1000 * step for step in after.step_seconds]),
                "prefix_hit": num_cached / num_prompt,
                "num_computed_tokens": num_computed,
                "padding": num_padded / (num_computed + num_padded),
                "mean_sequences": sum(after.batch_occupancy) / max(1, len(after.batch_occupancy)),
                "preemptions": after.preemptions - before.preemptions,
            },
        )
