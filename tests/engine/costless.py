"""An engine whose device costs nothing: what a request draws depends on its own tokens alone.

Everything is real but the runner, and steps can be made to wait or to fail.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from engine.async_engine import AsyncEngine
from engine.checkpoints import LoadedModel
from engine.config import EngineConfig
from engine.engine import Engine
from engine.in_flight import Draws
from engine.outputs import RequestOutput
from engine.plan import StepPlan, StepResults
from engine.sampling_params import SamplingParams
from tests.engine.engines import varied_model


@dataclass(frozen=True)
class CostlessStep:
    """What an `InFlight` is to the engine."""

    plan: StepPlan
    draws: Draws
    dispatched_at: float

    @property
    def must_end_first(self) -> bool:
        return False


class CostlessRunner:
    """Stands in for a StepRunner.

    before_results: called before a step's results are given, where a device would compute.
    """

    num_compiled = num_loaded = 0
    compile_seconds = 0.0
    device_name = "none"

    def __init__(self, num_pages: int, before_results: Callable[[], None] | None = None):
        self.num_pages = num_pages
        self.num_computed_tokens = self.num_padded_tokens = 0
        self.before_results = before_results
        self.plans: list[StepPlan] = []
        self.has_pages = True

    def make_pages(self) -> None:
        self.has_pages = True

    def drop_pages(self) -> None:
        self.has_pages = False

    def dispatch(self, plan: StepPlan, before: CostlessStep | None) -> CostlessStep:
        assert self.has_pages, "a step runs while the pages' memory is given back"
        self.num_computed_tokens += plan.num_tokens
        self.plans.append(plan)
        draws = Draws(np.zeros(0, np.int32), any_logprobs=False, any_history=False)
        return CostlessStep(plan, draws, time.monotonic())

    def collect(self, step: CostlessStep) -> StepResults:
        if self.before_results is not None:
            self.before_results()
        tokens = [
            None if request.is_finished else drawn_token(request.token_ids(0, request.num_tokens))
            for request in step.plan.arrays.requests.tolist()
        ]
        return StepResults(tokens)


def drawn_token(token_ids: list[int]) -> int:
    """Of the tiny model's vocabulary, and no special one."""
    return 10 + (sum(token_ids) * 31 + len(token_ids) * 7) % 230


def costless_engine(
    num_pages: int = 64, before_results: Callable[[], None] | None = None, **options: Any
) -> tuple[Engine, CostlessRunner]:
    """An engine of 8 sequences, steps of 32 tokens and pages of 16, of the tiny model's tokenizer."""
    defaults: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": 128,
        "page_size": 16,
        "stream_interval_ms": 0,
    }
    model = varied_model()
    loaded = LoadedModel(cast("Any", None), model.config, model.tokenizer, "", "", "")
    runner = CostlessRunner(num_pages, before_results)
    config = EngineConfig(**(defaults | options))
    return Engine(loaded, config, runner=cast("Any", runner)), runner


class Gate:
    """Lets steps pass one by one, or all."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False

    def __call__(self) -> None:
        if not self._is_open and not self._permits.acquire(timeout=30):
            raise AssertionError("no step was let through for 30 s")

    def let(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._permits.release()

    def open(self) -> None:
        self._is_open = True
        self._permits.release()


async def stream_all(
    front: AsyncEngine, prompt: Any, sampling: SamplingParams, **options: Any
) -> list[RequestOutput]:
    return [output async for output in front.stream(prompt, sampling, **options)]


def assert_nothing_is_left(front: AsyncEngine) -> None:
    stats = front.stats()
    assert (stats.pages_held, stats.running, stats.waiting, front.num_unfinished) == (0, 0, 0, 0)
    front.run_on_step_thread(front.engine.check_integrity).result()
