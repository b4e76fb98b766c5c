"""The texts of one stream's samples, as far as they have been shown."""

from __future__ import annotations

from collections.abc import Sequence

from engine.detokenizer import IncrementalDetokenizer
from engine.open_request import SampleEnd
from engine.outputs import CompletionOutput, RequestOutput
from engine.request import Request
from engine.request_group import RequestGroup


class GrowingTexts:
    """Grows by tokens, a portion at a time."""

    def __init__(self, group: RequestGroup):
        self._group = group
        self._samples = [_Sample(request, group.new_text()) for request in group.requests]
        self._num_told = 0  # characters of sample 0
        self._has_news = False

    @property
    def requests(self) -> Sequence[Request]:
        return self._group.requests

    @property
    def first(self) -> str:
        """What is known of sample 0's text."""
        return self._samples[0].text

    def grow(self, index: int, length: int, last_token_ids: list[int]) -> None:
        """A sample has come to `length` tokens, prompt and output; these are its last ones, perhaps more than
        are new."""
        sample = self._samples[index]
        num_new = length - sample.length
        if num_new > len(last_token_ids):
            raise AssertionError(f"{num_new - len(last_token_ids)} tokens of a stream were never shown")
        if num_new > 0:
            self._has_news |= sample.push(last_token_ids[-num_new:])

    def end(self, end: SampleEnd) -> None:
        """A sample has ended."""
        self._samples[end.sample.sample_index].end(end)
        self._has_news = True

    def take_output(self) -> RequestOutput | None:
        """An output, if a text has grown or a sample ended since the last one."""
        if not self._has_news:
            return None
        self._has_news = False
        start, self._num_told = self._num_told, len(self.first)
        return self._group.output_of(
            tuple([self._completion(sample) for sample in self._samples]), False, self.first[start:]
        )

    def rest(self, text: str) -> str:
        """What of sample 0's whole text has not been told."""
        return text[self._num_told :]

    def _completion(self, sample: _Sample) -> CompletionOutput:
        return self._group.completion_of(
            sample.request, tuple(sample.token_ids), sample.text, sample.finish_reason, sample.stop_reason
        )


class _Sample:
    def __init__(self, request: Request, detokenizer: IncrementalDetokenizer):
        self.request = request
        self._detokenizer = detokenizer
        self._prompt_len = request.prompt_len
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def length(self) -> int:
        return self._prompt_len + len(self.token_ids)

    def push(self, token_ids: list[int]) -> bool:
        """Take in new tokens; whether the text has grown."""
        self.token_ids += token_ids
        delta = self._detokenizer.push(token_ids)
        self.text += delta
        return bool(delta)

    def end(self, end: SampleEnd) -> None:
        """Take in the last tokens, and what was held back."""
        token_ids = end.token_ids[len(self.token_ids) :]
        self.token_ids += token_ids
        delta = self._detokenizer.push(token_ids[: len(token_ids) - end.num_hidden])
        self.text += delta + self._detokenizer.finish()
        self.finish_reason, self.stop_reason = end.finish_reason, end.stop_reason
