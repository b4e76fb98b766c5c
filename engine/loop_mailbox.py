"""From the text thread to asyncio: outputs wait in a mailbox each until their task fetches them.

A mailbox holds one output. One that comes before the last one was fetched takes its place, with the text of
both, so a slow reader costs no memory and misses nothing. An event loop is woken once for all mailboxes that
were filled since it last ran.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from dataclasses import replace

from engine.outputs import RequestOutput

_PORTION = 2
"""Tasks that are woken in one turn of a loop."""


class LoopWaker:
    """Wakes the tasks of one event loop, from other threads; it does not keep the loop alive."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._filled: list[asyncio.Event] = []

    def wake(self, event: asyncio.Event) -> None:
        """Have an event of the loop set soon. RuntimeError when the loop is closed."""
        with self._lock:
            self._filled.append(event)
            if len(self._filled) > 1:  # it has been woken and has not looked yet
                return
        loop = self._loop()
        try:
            if loop is None:
                raise RuntimeError("the event loop is gone")
            loop.call_soon_threadsafe(self._set_events)
        except RuntimeError:  # the next one is to be told too
            with self._lock:
                self._filled.clear()
            raise

    def _set_events(self) -> None:
        with self._lock:
            events, self._filled = self._filled[:_PORTION], self._filled[_PORTION:]
            is_rest = bool(self._filled)
        for event in events:
            event.set()
        if is_rest and (loop := self._loop()) is not None:
            loop.call_soon(self._set_events)


class Mailbox:
    """One task's outputs. Made in its event loop; `put` and `fail` are called by another thread."""

    def __init__(self, waker: LoopWaker):
        self._waker = waker
        self._event = asyncio.Event()
        self._lock = threading.Lock()
        self._output: RequestOutput | None = None
        self._error: Exception | None = None

    def put(self, output: RequestOutput) -> None:
        with self._lock:
            if self._output is not None:
                output = replace(output, delta_text=self._output.delta_text + output.delta_text)
            self._output = output
        self._waker.wake(self._event)

    def fail(self, error: Exception) -> None:
        with self._lock:
            self._error = error
        self._waker.wake(self._event)

    async def get(self) -> RequestOutput:
        """The next output; raises the error that came in its place."""
        while True:
            await self._event.wait()
            self._event.clear()
            with self._lock:
                output, self._output = self._output, None
            if output is not None:
                if self._error is not None:
                    self._event.set()
                return output
            if self._error is not None:
                raise self._error


_WAKERS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaker] = weakref.WeakKeyDictionary()
_WAKERS_LOCK = threading.Lock()


def waker_of_running_loop() -> LoopWaker:
    """The one waker of the event loop that runs in this thread."""
    loop = asyncio.get_running_loop()
    with _WAKERS_LOCK:
        waker = _WAKERS.get(loop)
        if waker is None:
            waker = _WAKERS[loop] = LoopWaker(loop)
        return waker
