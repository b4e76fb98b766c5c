"""The thread that makes texts of tokens and hands outputs to whoever waits for them.

The step thread gives it lists of events and never waits for it. Texts of streams are made here in portions, as
many tokens at a time as an interval brought: a character is shown whole or not yet, and text that may begin a
stop string is held back until it is certain (engine/detokenizer.py).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.detokenizer import IncrementalDetokenizer
from engine.open_request import Ended, Event, Failed, Growth, OpenRequest, SampleGrowth
from engine.outputs import CompletionOutput, RequestOutput
from engine.request_group import RequestGroup

_LOG = logging.getLogger(__name__)

_PORTION = 8
"""Events that are delivered in one go."""
_BREAK_SECONDS = 1e-5
"""Long enough for a waiting thread to be woken; with 0 this one would be back first."""


class TextThread:
    """Delivers events in the order in which they come.

    abort: called with a request whose receiver raised; nothing more is delivered to it.
    """

    def __init__(self, abort: Callable[[OpenRequest], None]):
        self._abort = abort
        self._events: queue.SimpleQueue[Sequence[Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tidemill-text", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, events: Sequence[Event]) -> None:
        """Hand over what a step brought; returns at once."""
        self._events.put(events)

    def end(self) -> None:
        """Deliver what was handed over and end; waits for it, unless a receiver calls this."""
        self._events.put(None)
        if self._thread.ident is None:  # never started
            self._run()
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (events := self._events.get()) is not None:
            for index, event in enumerate(events):
                # A step thread that wants the interpreter meanwhile would otherwise be given it only after
                # `sys.getswitchinterval()`, which is as long as a step.
                if index % _PORTION == _PORTION - 1:
                    time.sleep(_BREAK_SECONDS)
                self._deliver(event)

    def _deliver(self, event: Event) -> None:
        request = event.request
        if request.is_dropped:
            return
        try:
            if isinstance(event, Failed):
                request.on_error(event.error)
            elif isinstance(event, Ended):
                request.on_output(_last_output(event))
            else:
                if request.texts is None:
                    assert request.group is not None
                    request.texts = GrowingTexts(request.group)
                output = request.texts.grow(event.samples)
                if output is not None:
                    request.on_output(_with_prompt(output, request))
        except Exception:  # the receiver's: nobody else is to suffer from it
            _LOG.exception("the receiver of request %r failed: the request is aborted", request.request_id)
            self._abort(request)


class GrowingTexts:
    """The texts of one stream's samples, as far as they have been shown."""

    def __init__(self, group: RequestGroup):
        self._group = group
        self._samples = [_Sample(group.new_text()) for _ in group.requests]

    @property
    def first(self) -> str:
        """What has been shown of sample 0."""
        return self._samples[0].text

    def grow(self, growth: Sequence[SampleGrowth]) -> RequestOutput | None:
        """Take in new tokens; an output if a text has grown or a sample ended."""
        num_shown, has_news = len(self.first), False
        for part in growth:
            has_news |= self._samples[part.index].grow(part)
        if not has_news:
            return None
        outputs = tuple(map(self._completion, range(len(self._samples))))
        return self._group.output_of(outputs, False, self.first[num_shown:])

    def _completion(self, index: int) -> CompletionOutput:
        sample, request = self._samples[index], self._group.requests[index]
        return self._group.completion_of(
            request, tuple(sample.token_ids), sample.text, sample.finish_reason, sample.stop_reason
        )


class _Sample:
    def __init__(self, detokenizer: IncrementalDetokenizer):
        self._detokenizer = detokenizer
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def grow(self, growth: SampleGrowth) -> bool:
        """Take in new tokens; whether there is more to show than before."""
        tokens = growth.token_ids
        self.token_ids += tokens
        delta = self._detokenizer.push(tokens[: len(tokens) - growth.num_hidden])
        if growth.finish_reason is not None:
            delta += self._detokenizer.finish()
            self.finish_reason, self.stop_reason = growth.finish_reason, growth.stop_reason
        self.text += delta
        return bool(delta) or growth.finish_reason is not None


def _last_output(event: Ended) -> RequestOutput:
    """The output with its texts made, here and not in its receiver's time."""
    request, output = event
    for sample in output.outputs:
        assert isinstance(sample.text, str)
    if request.stream:
        num_shown = 0 if request.texts is None else len(request.texts.first)
        output = replace(output, delta_text=output.outputs[0].text[num_shown:])
    return _with_prompt(output, request)


def _with_prompt(output: RequestOutput, request: OpenRequest) -> RequestOutput:
    """The engine was given token ids: the text that they were made of is told here."""
    return output if request.prompt is None else replace(output, prompt=request.prompt)
