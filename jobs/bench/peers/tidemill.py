"""This project's own engine, as a process that answers jobs (`serving`): measured as the peers are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jobs.bench.measurement import Measurement, percentiles
from jobs.bench.peers.serving import Generated, Request, Sampling, serve
from jobs.bench.workloads import Workload


class Tidemill:
    """An engine; `settings["options"]` are fields of its config."""

    def __init__(self, settings: dict[str, Any]):
        import jax

        from engine.engine import Engine

        self._jax_version = jax.__version__
        self._engine = Engine.from_pretrained(settings["model"], **settings["options"])
        self.compile_seconds = self._engine.stats().compile_seconds

    @property
    def about(self) -> str:
        return f"Tidemill on jax {self._jax_version}, its steps ready in {self.compile_seconds:.1f} s"

    def measure(self, workload: Workload) -> Measurement:
        """Run a workload in this process."""
        pairs = zip(workload.prompts, workload.max_tokens, strict=True)
        requests = [Request(index, prompt, num) for index, (prompt, num) in enumerate(pairs)]
        started = time.perf_counter()
        generated = self.generate(requests, workload.sampling, {})
        seconds = time.perf_counter() - started
        token_ids = tuple(tuple(ids) for ids in generated.token_ids)
        return Measurement("tidemill", seconds, token_ids, generated.details)

    def prepare(self, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
        self.generate(requests, sampling, {})
        return {}

    def generate(self, requests: Sequence[Request], sampling: Sampling, plan: dict[str, Any]) -> Generated:
        from engine.sampling_params import SamplingParams

        params = [
            SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                ignore_eos=sampling.ignore_eos,
                max_tokens=request.max_tokens,
            )
            for request in requests
        ]
        before = self._engine.stats()
        outputs = self._engine.generate([list(request.prompt) for request in requests], params)
        after = self._engine.stats()
        num_prompt = after.num_prompt_tokens - before.num_prompt_tokens
        num_computed = after.num_computed_tokens - before.num_computed_tokens
        num_padded = after.num_padded_tokens - before.num_padded_tokens
        return Generated(
            [list(sample.token_ids) for output in outputs for sample in output.outputs],
            {
                "num_steps": after.num_steps - before.num_steps,
                "step_ms": percentiles([1000 * step for step in after.step_seconds]),
                "prefix_hit": (after.num_cached_tokens - before.num_cached_tokens) / num_prompt,
                "num_computed_tokens": num_computed,
                "padding": num_padded / max(1, num_computed + num_padded),
                "mean_sequences": sum(after.batch_occupancy) / max(1, len(after.batch_occupancy)),
                "preemptions": after.preemptions - before.preemptions,
            },
        )


def engine_options() -> set[str]:
    """The names that `settings["options"]` may have."""
    from engine.config import EngineConfig

    return {field.name for field in fields(EngineConfig)}


if __name__ == "__main__":
    serve(Tidemill)
