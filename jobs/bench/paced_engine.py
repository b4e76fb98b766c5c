"""An engine of a fixed speed, without a model: what is measured with it is everything around the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.drawn import DrawnTokens
from engine.outputs import CompletionOutput, EngineStats, RequestMetrics, RequestOutput
from engine.sampling_params import SamplingParams


@dataclass(slots=True)
class _Running:
    request_id: str
    prompt: tuple[int, ...]
    num_left: int
    num_tokens: int
    arrival: float
    first_token: float | None = None


class PacedEngine:
    """Every step takes `step_seconds` and gives each of `max_num_seqs` requests a token; `max_tokens` end
    one.

    As on an accelerator, the next step is under way while the host works on the last one's results: a host
    that takes less than a step's time costs nothing.
    """

    num_pages = 1024

    def __init__(self, step_seconds: float, max_num_seqs: int):
        self._step_seconds = step_seconds
        self._max_num_seqs = max_num_seqs
        self._requests: dict[str, _Running] = {}
        self._ready = 0.0  # when the step that is under way ends
        self._num_steps = 0
        self._num_generated = 0
        self._num_prompt = 0
        self._seconds: list[float] = []
        self._occupancy: list[int] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        *,
        sampling: SamplingParams,
        identity: str,
        expected_output_len: int | None,
        drawn: Sequence[DrawnTokens] | None = None,
    ) -> None:
        """`drawn` tokens are not drawn again."""
        now = time.monotonic()
        tokens = sampling.max_tokens
        left = max(1, tokens - len(drawn[0].token_ids)) if drawn else tokens
        self._requests[request_id] = _Running(request_id, tuple(prompt_token_ids), left, tokens, now)
        self._num_prompt += len(prompt_token_ids)

    def abort_request(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def drawn_tokens(self, request_id: str) -> None:
        """None: a row that is given up begins anew."""

    def pin_prefix(self, token_ids: Sequence[int]) -> None:
        """There is no cache."""

    def release_prefix(self, token_ids: Sequence[int]) -> None:
        """There is no cache."""

    def step(self) -> list[RequestOutput]:
        started = time.monotonic()
        # A step begins when the one before it ended, or when there was something to do again.
        self._ready = max(self._ready, started - self._step_seconds) + self._step_seconds
        time.sleep(max(0.0, self._ready - started))
        now = time.monotonic()
        running = list(self._requests.values())[: self._max_num_seqs]
        for each in running:
            each.num_left -= 1
            each.first_token = each.first_token or now
        self._num_steps += 1
        self._num_generated += len(running)
        self._seconds.append(now - started)
        self._occupancy.append(len(running))
        return [self._finish(each, now) for each in running if not each.num_left]

    def _finish(self, each: _Running, now: float) -> RequestOutput:
        del self._requests[each.request_id]
        tokens = tuple((97 + i) % 256 for i in range(each.num_tokens))
        return RequestOutput(
            request_id=each.request_id,
            prompt=None,
            prompt_token_ids=each.prompt,
            outputs=(CompletionOutput(0, tokens, "length", text=f"{each.request_id} " * each.num_tokens),),
            finished=True,
            metrics=RequestMetrics(each.arrival, each.first_token, each.first_token, now),
        )

    def stats(self) -> EngineStats:
        seconds, self._seconds = tuple(self._seconds), []
        occupancy, self._occupancy = tuple(self._occupancy), []
        values: dict[str, Any] = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
        values |= {
            "num_steps": self._num_steps,
            "step_seconds": seconds,
            "batch_occupancy": occupancy,
            "num_prompt_tokens": self._num_prompt,
            "num_computed_tokens": self._num_prompt + self._num_generated,
            "num_generated_tokens": self._num_generated,
            "running": min(len(self._requests), self._max_num_seqs),
            "pages_free": self.num_pages,
            "num_replicas": 1,
            "compile_seconds": 0.0,
            "device": f"{self._step_seconds:g} s a step",
        }
        return EngineStats(**values)
