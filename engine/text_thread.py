"""The thread that makes texts of tokens and hands outputs to whoever waits for them.

The step thread gives it lists of events and never waits for it. Texts of streams are made here in portions,
as many tokens at a time as an interval brought: a character is shown whole or not yet, and text that may
begin a stop string is held back until it is certain (engine/detokenizer.py).

Where a sample ends is the step thread's to say. So requests with stop strings have their text made there as
well, token by token: no token is computed after a stop that could have been known of.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.growing_texts import GrowingTexts
from engine.open_request import Ended, Event, Failed, Growth, Opened, OpenRequest
from engine.outputs import RequestOutput
from engine.request import Request

_LOG = logging.getLogger(__name__)

_PORTION = 8
"""Outputs that are delivered in one go."""
_BREAK_SECONDS = 1e-5
"""Long enough for a waiting thread to be woken; with 0 this one would be back first."""


class TextThread:
    """Delivers events in the order in which they come.

    abort: called with a request whose receiver raised; nothing more is delivered to it.
    """

    def __init__(self, abort: Callable[[OpenRequest], None]):
        self._abort = abort
        self._events: queue.SimpleQueue[Sequence[Event] | None] = queue.SimpleQueue()
        self._texts: dict[OpenRequest, GrowingTexts] = {}
        # Whose each sample of an open stream is.
        self._owners: dict[Request, OpenRequest] = {}
        self._num_delivered = 0
        self._thread = threading.Thread(target=self._run, name="tidemill-text", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, events: Sequence[Event]) -> None:
        """Hand over what a step brought; returns at once."""
        self._events.put(events)

    @property
    def is_behind(self) -> bool:
        """What was handed over has not all been taken up: more growth would wait, and make more work than
        the same tokens all at once."""
        return not self._events.empty()

    def end(self) -> None:
        """Deliver what was handed over and end; waits for it, unless a receiver calls this."""
        self._events.put(None)
        if self._thread.ident is None:  # never started
            self._run()
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (events := self._events.get()) is not None:
            for event in events:
                self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, Growth):
            self._grow(event)
            return
        request = event.request
        if isinstance(event, Opened):
            self._texts[request] = GrowingTexts(event.group)
            self._owners.update(dict.fromkeys(event.group.requests, request))
        elif isinstance(event, Failed):
            self._deliver(request, lambda: request.on_error(event.error))
            self._forget(request)
        elif isinstance(event, Ended):
            self._deliver(request, lambda: request.on_output(self._last_output(event)))
            self._forget(request)
        else:
            self._forget(request)

    def _grow(self, growth: Growth) -> None:
        grown: dict[OpenRequest, GrowingTexts] = {}
        for drawn in growth.drawn:
            rows = zip(drawn.requests, drawn.lens.tolist(), drawn.token_ids.tolist(), strict=True)
            for sample, length, token_ids in rows:
                owner = self._owners.get(sample)
                if owner is not None and not owner.is_dropped:
                    texts = grown[owner] = self._texts[owner]
                    texts.grow(sample.sample_index, length, token_ids)
        for end in growth.ends:
            texts = grown[end.request] = self._texts[end.request]
            texts.end(end)
        for request, texts in grown.items():
            output = texts.take_output()
            if output is not None:
                self._deliver(request, lambda r=request, o=output: r.on_output(_with_prompt(o, r)))

    def _deliver(self, request: OpenRequest, call: Callable[[], None]) -> None:
        if request.is_dropped:
            return
        # A step thread that wants the interpreter meanwhile would otherwise be given it only after
        # `sys.getswitchinterval()`, which is as long as a step.
        self._num_delivered += 1
        if self._num_delivered % _PORTION == 0:
            time.sleep(_BREAK_SECONDS)
        try:
            call()
        except Exception:  # the receiver's: nobody else is to suffer from it
            _LOG.exception("the receiver of request %r failed: the request is aborted", request.request_id)
            self._abort(request)

    def _last_output(self, event: Ended) -> RequestOutput:
        request, output = event
        # Made now, and not in the receiver's time.
        first, *_ = [sample.text for sample in output.outputs]
        if request.stream:
            output = replace(output, delta_text=self._texts[request].rest(first))
        return _with_prompt(output, request)

    def _forget(self, request: OpenRequest) -> None:
        texts = self._texts.pop(request, None)
        if texts is not None:
            for sample in texts.requests:
                del self._owners[sample]


def _with_prompt(output: RequestOutput, request: OpenRequest) -> RequestOutput:
    """The engine was given token ids: the text that they were made of is told here."""
    return output if request.prompt is None else replace(output, prompt=request.prompt)
