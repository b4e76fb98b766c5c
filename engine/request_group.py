"""The samples of one prompt together: their text as it grows, and the output made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from engine.detokenizer import IncrementalDetokenizer, whole_text
from engine.errors import RequestError
from engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from engine.presentation import Increments, Presentation
from engine.request import Request, TopLogprobs
from engine.stop_pattern import StopPattern


class RequestGroup:
    """What the engine keeps of a request besides the scheduler's state of its samples.

    Text that nobody needs while it grows is made once, by who reads it in the output.
    """

    def __init__(
        self,
        requests: list[Request],
        prompt: str | None,
        tokenizer: Any,
        stream: bool,
        shown: Presentation | None = None,
    ):
        """shown: what the caller sees of it; default: all of it."""
        self._requests = requests
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._shown = shown
        self._num_outputs = 0
        kind = requests[0].sampling.output_kind
        self._increments = Increments(len(requests)) if stream and kind == "delta" else None
        self.stream = stream
        sampling = requests[0].sampling
        self.grows = stream or bool(sampling.stop) or sampling.stop_pattern is not None
        """Its text is wanted token by token: `push` each one."""
        self._texts = [self.new_text() for _ in requests] if self.grows else []
        for request, text in zip(requests, self._texts, strict=False):
            for token in request.output_token_ids:  # given
                text.push([token])
        self._num_pushed = [request.num_tokens for request in requests] if self.grows else []
        self._num_open = len(requests)

    def push(self, request: Request) -> str:
        """Take in the tokens drawn since the last call; the text that became certain with them.

        A token that stopped the sample is no part of its text unless asked for. Of several tokens that one
        step drew, those behind the one that completes a stop string are forgotten.
        """
        index = request.sample_index
        text, start = self._texts[index], self._num_pushed[index]
        stop = self._num_pushed[index] = request.num_tokens
        delta = ""
        for at in range(start, stop - ends_with_hidden_token(request)):
            delta += text.push(request.token_ids(at, at + 1))
            if text.stopped_by is not None:
                if at + 1 < stop:
                    request.cut(at + 1)
                break
        return delta

    def stopped_by(self, request: Request) -> str | None:
        """The stop string found in the sample's text."""
        return self._texts[request.sample_index].stopped_by if self.grows else None

    def close(self, request: Request) -> str:
        """The sample is finished: what its text held back."""
        self._num_open -= 1
        if not self.grows:
            return ""
        delta = self._texts[request.sample_index].finish()
        stop = self.stopped_by(request)
        if stop is not None:  # found in the very token, or the very end, that length ended it with
            request.finish_reason, request.stop_reason = "stop", stop
        return delta

    def hand_over(self, request_id: str, prompt: str | None, arrival_time: float) -> None:
        """The request goes on as another one, that came later."""
        self._prompt = prompt
        for request in self._requests:
            request.request_id, request.arrival_time = request_id, arrival_time
            if request.first_scheduled_time is not None:
                request.first_scheduled_time = max(request.first_scheduled_time, arrival_time)
            if request.first_token_time is not None:
                request.first_token_time = max(request.first_token_time, arrival_time)

    @property
    def is_finished(self) -> bool:
        return self._num_open == 0

    @property
    def requests(self) -> Sequence[Request]:
        """The samples, in order."""
        return self._requests

    def shows(self, delta_text: str) -> bool:
        """Whether a step after which it is unfinished gives an output: its text has grown, or it has none."""
        return self.stream and bool(delta_text or not self._requests[0].sampling.detokenize)

    def samples(self) -> tuple[CompletionOutput, ...]:
        """All that were drawn, as they stand."""
        return tuple([self._completion(request) for request in self._requests])

    def output(self, delta_text: str) -> RequestOutput:
        return self.output_of(self.samples(), self.is_finished, delta_text if self.stream else "")

    def output_of(
        self, outputs: tuple[CompletionOutput, ...], finished: bool, delta_text: str
    ) -> RequestOutput:
        """An output of these samples (`completion_of`), which may lag behind what is known by now."""
        first, whole_text = self._requests[0], None
        self._num_outputs += 1
        if self._shown is not None:
            if self._shown.chooses:
                outputs = self._shown.chosen(outputs)
            outputs = self._shown.without_hidden(outputs)
        if self._increments is not None:
            whole_text, outputs = outputs[0].text, self._increments.of(outputs)
        return RequestOutput(
            request_id=first.request_id,
            prompt=self._prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=outputs,
            finished=finished,
            metrics=self._metrics(finished),
            prompt_logprobs=_prompt_logprobs(first),
            delta_text=delta_text,
            num_cached_tokens=first.num_cached_tokens,
            num_truncated_tokens=0 if self._shown is None else self._shown.num_cut,
            num_generated_tokens=sum([request.num_output_tokens for request in self._requests]),
            update_seq=self._num_outputs,
            whole_text=whole_text,
        )

    def _completion(self, request: Request) -> CompletionOutput:
        token_ids = tuple(request.output_token_ids)
        text = self._text(request, token_ids)
        return self.completion_of(request, token_ids, text, request.finish_reason, request.stop_reason)

    def completion_of(
        self,
        request: Request,
        token_ids: tuple[int, ...],
        text: str | Callable[[], str],
        finish_reason: str | None,
        stop_reason: int | str | None,
    ) -> CompletionOutput:
        """A sample's output up to these tokens, the first ones that it has."""
        logprobs = None
        if request.sampling.logprobs is not None:
            count = len(token_ids)
            logprobs = tuple(
                TokenLogprob(*entry)
                for entry in zip(
                    token_ids,
                    request.output_logprobs[:count],
                    request.output_top_logprobs[:count],
                    strict=True,
                )
            )
        return CompletionOutput(
            index=request.sample_index,
            token_ids=token_ids,
            finish_reason=finish_reason,
            text=text,
            stop_reason=stop_reason,
            cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
            logprobs=logprobs,
            parsing=None if self._shown is None else self._shown.parsing,
        )

    def _text(self, request: Request, token_ids: tuple[int, ...]) -> str | Callable[[], str]:
        sampling = request.sampling
        if not sampling.detokenize:
            return ""
        if self.grows:
            return self._texts[request.sample_index].text
        shown = token_ids[:-1] if ends_with_hidden_token(request) else token_ids
        how = (sampling.skip_special_tokens, sampling.spaces_between_special_tokens)
        return partial(whole_text, self._tokenizer, shown, *how)

    def new_text(self) -> IncrementalDetokenizer:
        """What makes the text of one sample, from its first token on."""
        sampling, parsing = self._requests[0].sampling, None if self._shown is None else self._shown.parsing
        return IncrementalDetokenizer(
            self._tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
            stop_pattern=None if sampling.stop_pattern is None else StopPattern.of(sampling.stop_pattern),
            spaces_between_special_tokens=sampling.spaces_between_special_tokens,
            may_stop_after=None if parsing is None else parsing.stop_gate(),
            detokenize=sampling.detokenize,
        )

    def _metrics(self, finished: bool) -> RequestMetrics:
        requests, first = self._requests, self._requests[0]
        ends = [request.finished_time for request in requests if request.finished_time is not None]
        return RequestMetrics(
            arrival_time=first.arrival_time or 0.0,
            first_scheduled_time=first.first_scheduled_time,
            first_token_time=first.first_token_time,
            finished_time=max(ends) if finished and ends else None,
            num_preemptions=sum([request.num_preemptions for request in requests]),
            output_time=time.monotonic(),
        )


def ends_with_hidden_token(request: Request) -> bool:
    """A token stopped the sample, and what stops a text is not shown in it."""
    if request.finish_reason not in ("stop", "error") or not request.is_finished:
        return False
    return not request.sampling.include_stop_str_in_output


def _prompt_logprobs(request: Request) -> tuple[TokenLogprob | None, ...] | None:
    if request.sampling.prompt_logprobs is None:
        return None
    known: Sequence[tuple[int, float, TopLogprobs]] = list(
        zip(request.prompt_token_ids[1:], request.prompt_logprobs, request.prompt_top_logprobs, strict=False)
    )
    return (None, *(TokenLogprob(*entry) for entry in known))


def bad_word_token_ids(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each bad word, as it begins a text and as it follows a space.

    Raises RequestError for a word that has no tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        spellings = {word, " " + word.lstrip()}
        for spelling in sorted(spellings):
            ids = tuple(tokenizer(spelling, add_special_tokens=False)["input_ids"])
            if not ids:
                raise RequestError(
                    "bad_sampling", f"sampling.bad_words: {word!r} has no tokens in this tokenizer"
                )
            found[ids] = None
    return tuple(found)
