"""How likely the tokens were that requests drew."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.request import Request


@dataclass(frozen=True, slots=True)
class SamplerStats:
    """Of the samples that finished since the last look. Log-probabilities are the model's, before
    temperature, penalties and masks; None where there were no tokens."""

    num_tokens: int
    num_greedy_tokens: int
    mean_logprob: float | None
    min_logprob: float | None

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-probability."""
        return None if self.mean_logprob is None else math.exp(-self.mean_logprob)


class SamplerMeter:
    """Adds up requests that ran with log-probabilities."""

    def __init__(self) -> None:
        self._clear()

    def add(self, request: Request) -> None:
        """A sample has finished."""
        logprobs = request.output_logprobs
        self._num_tokens += len(logprobs)
        self._num_greedy += len(logprobs) if request.sampling.is_greedy else 0
        self._sum += math.fsum(logprobs)
        self._min = min((self._min, *logprobs))

    def take(self) -> SamplerStats:
        """The count since the last call."""
        count, mean, least = self._num_tokens, None, None
        if count:
            mean, least = self._sum / count, self._min
        stats = SamplerStats(count, self._num_greedy, mean, least)
        self._clear()
        return stats

    def _clear(self) -> None:
        self._num_tokens = self._num_greedy = 0
        self._sum, self._min = 0.0, math.inf
