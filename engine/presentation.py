"""What of a request its caller is shown, where that is not all that was drawn for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import RequestError
from engine.message_parsing import Parsing
from engine.outputs import CompletionOutput
from engine.sampling_params import SamplingParams

Outputs = tuple[CompletionOutput, ...]


@dataclass(frozen=True, slots=True)
class Presentation:
    """sampling: as it was asked for; the request may run with more: log-probabilities that choose among its
    samples, or are counted. num_cut: tokens of its prompt that were cut.
    """

    sampling: SamplingParams
    num_cut: int = 0
    parsing: Parsing | None = None

    @property
    def chooses(self) -> bool:
        return self.sampling.num_samples > self.sampling.n

    def chosen(self, samples: Outputs) -> Outputs:
        """The `n` likeliest samples, by cumulative log-probability, the likeliest first; of equals
        the one drawn first."""
        by_likelihood = sorted(samples, key=_likelihood, reverse=True)[: self.sampling.n]
        return tuple([sample.but(index=index) for index, sample in enumerate(by_likelihood)])

    def without_hidden(self, samples: Outputs) -> Outputs:
        """Without log-probabilities that nobody asked for."""
        if self.sampling.logprobs is not None or all(sample.logprobs is None for sample in samples):
            return samples
        return tuple([_without_logprobs(sample, keeps_sum=self.chooses) for sample in samples])


def check_presentable(sampling: SamplingParams | None, stream: bool) -> None:
    """Raises RequestError for what an `AsyncEngine` cannot show: it has one form of outputs for all."""
    if sampling is None:
        return
    if sampling.output_kind is not None:
        raise RequestError(
            "bad_sampling",
            "sampling.output_kind is for Engine: an output of AsyncEngine has the whole text, and delta_text",
        )
    if stream and sampling.num_samples > sampling.n:
        raise RequestError("bad_sampling", "sampling.best_of chooses at the end: it cannot be streamed")


class Increments:
    """What each sample of a streamed request has grown by since it was last shown."""

    def __init__(self, num_samples: int):
        self._num_shown = [(0, 0)] * num_samples

    def of(self, samples: Sequence[CompletionOutput]) -> Outputs:
        """The samples with their new text, tokens and log-probabilities alone."""
        return tuple([self._increment(index, sample) for index, sample in enumerate(samples)])

    def _increment(self, index: int, sample: CompletionOutput) -> CompletionOutput:
        num_chars, num_tokens = self._num_shown[index]
        self._num_shown[index] = len(sample.text), len(sample.token_ids)
        logprobs = sample.logprobs
        return sample.but(
            text=sample.text[num_chars:],
            token_ids=sample.token_ids[num_tokens:],
            logprobs=None if logprobs is None else logprobs[num_tokens:],
        )


def _likelihood(sample: CompletionOutput) -> float:
    return -math.inf if sample.cumulative_logprob is None else sample.cumulative_logprob


def _without_logprobs(sample: CompletionOutput, *, keeps_sum: bool) -> CompletionOutput:
    return sample.but(logprobs=None, cumulative_logprob=sample.cumulative_logprob if keeps_sum else None)
