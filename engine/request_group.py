"""The samples of one prompt together: their text as it grows, and the output made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from engine.detokenizer import IncrementalDetokenizer, whole_text
from engine.errors import RequestError
from engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from engine.request import Request, TopLogprobs


class RequestGroup:
    """What the engine keeps of a request besides the scheduler's state of its samples.

    Text that nobody needs while it grows is made once, by who reads it in the output.
    """

    def __init__(self, requests: list[Request], prompt: str | None, tokenizer: Any, stream: bool):
        self._requests = requests
        self._prompt = prompt
        self._tokenizer = tokenizer
        self.stream = stream
        self.grows = stream or bool(requests[0].sampling.stop)
        """Its text is wanted token by token: `push` each one."""
        self._texts = [self._new_text() for _ in requests] if self.grows else []
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
        for at in range(start, stop - _ends_with_hidden_token(request)):
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

    def output(self, delta_text: str) -> RequestOutput:
        first = self._requests[0]
        return RequestOutput(
            request_id=first.request_id,
            prompt=self._prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=tuple([self._completion(request) for request in self._requests]),
            finished=self.is_finished,
            metrics=self._metrics(),
            prompt_logprobs=_prompt_logprobs(first),
            delta_text=delta_text if self.stream else "",
            num_cached_tokens=first.num_cached_tokens,
        )

    def _completion(self, request: Request) -> CompletionOutput:
        logprobs, token_ids = None, tuple(request.output_token_ids)
        if request.sampling.logprobs is not None:
            logprobs = tuple(
                TokenLogprob(*entry)
                for entry in zip(
                    token_ids,
                    request.output_logprobs,
                    request.output_top_logprobs,
                    strict=True,
                )
            )
        return CompletionOutput(
            index=request.sample_index,
            token_ids=token_ids,
            finish_reason=request.finish_reason,
            text=self._text(request, token_ids),
            stop_reason=request.stop_reason,
            cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
            logprobs=logprobs,
        )

    def _text(self, request: Request, token_ids: tuple[int, ...]) -> str | Callable[[], str]:
        if self.grows:
            return self._texts[request.sample_index].text
        shown = token_ids[:-1] if _ends_with_hidden_token(request) else token_ids
        return partial(whole_text, self._tokenizer, shown, request.sampling.skip_special_tokens)

    def _new_text(self) -> IncrementalDetokenizer:
        sampling = self._requests[0].sampling
        return IncrementalDetokenizer(
            self._tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )

    def _metrics(self) -> RequestMetrics:
        requests, first = self._requests, self._requests[0]
        ends = [request.finished_time for request in requests if request.finished_time is not None]
        return RequestMetrics(
            arrival_time=first.arrival_time or 0.0,
            first_scheduled_time=first.first_scheduled_time,
            first_token_time=first.first_token_time,
            finished_time=max(ends) if self.is_finished and ends else None,
            num_preemptions=sum([request.num_preemptions for request in requests]),
        )


def _ends_with_hidden_token(request: Request) -> bool:
    """A token stopped the sample, and what stops a text is not shown in it."""
    if request.finish_reason != "stop" or not request.is_finished:
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
