"""The thread that steps an engine: between two steps it does what others ask of it.

    others      call(...) ─┐
    step thread            └▶ commands | step | outputs, overdue requests, growth of streams ─┐
    text thread                                                                               └▶ receivers

Nobody else touches the engine. Nothing is copied or made text here that the text thread can do.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import EngineClosed
from engine.open_request import Dropped, Ended, Event, Failed, Growth, Opened, OpenRequest, SampleEnd
from engine.outputs import RequestOutput
from engine.presentation import check_presentable
from engine.text_thread import TextThread

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.request import Request

T = TypeVar("T")

_MAX_STALE = 1024
"""Time limits of requests that have ended, kept because they are not due yet."""


class StepThread:
    """Steps `engine` as long as it has unfinished requests, and sleeps otherwise.

    on_end: called in this thread with each request that has left the engine.
    stream_interval: seconds between two looks at what streams have drawn.
    """

    def __init__(
        self, engine: Engine, text: TextThread, on_end: Callable[[OpenRequest], None], stream_interval: float
    ):
        self._engine = engine
        self._text = text
        self._on_end = on_end
        self._interval = stream_interval
        self.error: Exception | None = None
        """What ended the thread, where it was not told to end."""
        self._wakened = threading.Condition()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._is_over = False
        self._open: dict[str, OpenRequest] = {}
        self._num_streams = 0
        # Of streams of several samples, those that had not ended at the last look.
        self._several: dict[OpenRequest, set[Request]] = {}
        self._watches = engine.watch_seats()
        self._deadlines: list[tuple[float, int, OpenRequest]] = []
        self._num_deadlines = 0
        self._shown_at = 0.0
        self._thread = threading.Thread(target=self._run, name="tidemill-step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- any thread --------------------------------------------------------------------------------

    def call(self, call: Callable[[], T]) -> Future[T]:
        """Have something done between two steps, in the order of the calls; its result, or what it raised.

        It is an EngineClosed where the thread has ended.
        """
        future: Future[T] = Future()
        with self._wakened:
            if not self._is_over:
                self._calls.append((future, call))
                self._wakened.notify()
                return future
        future.set_exception(self.closed_error())
        return future

    def closed_error(self) -> EngineClosed:
        """Why no requests are taken any more."""
        if self.error is None:
            return EngineClosed("the engine is closed: it takes no requests any more")
        return EngineClosed(f"the engine has failed and takes no requests any more: {self.error}")

    def end(self) -> None:
        """End after the calls before this one; waits for it, unless the thread itself calls this."""
        self.call(self._stop)
        if self._thread.ident is None:  # never started
            self._run()
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the step thread ---------------------------------------------------------------------------

    def add(self, request: OpenRequest, **arguments: Any) -> None:
        """Queue a request in the engine, `arguments` being those of `Engine.add_request`."""
        engine, request_id = self._engine, request.request_id
        check_presentable(arguments.get("sampling"), request.stream)
        engine.add_request(request_id, stream=False, shares_result=not request.stream, **arguments)
        self._open[request_id] = request
        group = engine.request_group(request_id) if request.stream else None
        if group is not None:
            self._num_streams += 1
            self._text.put([Opened(request, group)])
            if len(group.requests) > 1:
                self._several[request] = set(group.requests)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, self._num_deadlines, request))
            self._num_deadlines += 1
        if request.is_aborted:
            self.finish(request, "abort")

    def finish(self, request: OpenRequest, reason: str) -> None:
        """End a request as it stands, if it is unfinished, and deliver its last output."""
        if not self._is_open(request):
            return
        output = self._engine.end_request(request.request_id, reason)
        self._forget(request)
        if output is not None:
            self._text.put([Ended(request, output)])

    def drop(self, request: OpenRequest) -> None:
        """End a request that nobody waits for."""
        if self._is_open(request):
            self._engine.abort_request(request.request_id)
            self._forget(request)
            self._text.put([Dropped(request)])

    def pause(self) -> None:
        """What streams have drawn is shown; of the step in progress after the pause."""
        self._show_streams(time.monotonic())
        self._engine.pause()

    def finish_all(self, reason: str) -> None:
        for request in list(self._open.values()):
            self.finish(request, reason)

    def _run(self) -> None:
        try:
            while not self._is_over:
                self._turn()
        except Exception as error:  # every waiting caller is told
            self.error = error
        with self._wakened:
            self._is_over = True
            calls = list(self._calls)
            self._calls.clear()
        for request in list(self._open.values()):
            self._forget(request)
            self._text.put([Failed(request, self.error or self.closed_error())])
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(self.closed_error())

    def _turn(self) -> None:
        """What has been asked for, and a step if there is anything to compute."""
        for future, call in self._next_calls():
            _run_call(future, call)
        if self._is_over:
            return
        if self._engine.has_work:
            self._take(self._engine.step())
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            self.finish(heapq.heappop(self._deadlines)[-1], "timeout")
        if self._num_streams and now - self._shown_at >= self._interval and not self._text.is_behind:
            self._show_streams(now)

    def _next_calls(self) -> list[tuple[Future[Any], Callable[[], Any]]]:
        """What has been asked for; waits for it where there is nothing else to do."""
        with self._wakened:
            if not self._calls and not self._engine.has_work:
                until_due = self._deadlines[0][0] - time.monotonic() if self._deadlines else None
                self._wakened.wait(None if until_due is None else max(0.0, until_due))
            calls = list(self._calls)
            self._calls.clear()
        return calls

    def _take(self, outputs: list[RequestOutput]) -> None:
        events: list[Event] = []
        for output in outputs:
            request = self._open.get(output.request_id)
            if request is not None:
                self._forget(request)
                events.append(Ended(request, output))
        if events:
            self._text.put(events)

    def _show_streams(self, now: float) -> None:
        """Pass on what has been drawn since the last time."""
        self._shown_at = now
        drawn = [each for watch in self._watches if (each := watch.look()) is not None]
        ends: list[SampleEnd] = []
        for request, unfinished in self._several.items():
            ended = [sample for sample in unfinished if sample.is_finished]
            ends += [SampleEnd.of(request, sample) for sample in ended]
            unfinished.difference_update(ended)
        if drawn or ends:
            self._text.put([Growth(drawn, ends)])

    def _forget(self, request: OpenRequest) -> None:
        del self._open[request.request_id]
        self._num_streams -= request.stream
        self._several.pop(request, None)
        if len(self._deadlines) > 2 * len(self._open) + _MAX_STALE:  # most are of requests that have ended
            self._deadlines = [each for each in self._deadlines if self._is_open(each[-1])]
            heapq.heapify(self._deadlines)
        self._on_end(request)

    def _is_open(self, request: OpenRequest) -> bool:
        return self._open.get(request.request_id) is request

    def _stop(self) -> None:
        self._is_over = True


def _run_call(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except Exception as error:  # the caller's to see
        future.set_exception(error)
    else:
        future.set_result(result)
