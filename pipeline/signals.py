"""SIGTERM and Ctrl-C ask for a drain; a second Ctrl-C, or a drain that hangs, ends the process at once.

A thread reads the signals (through `signal.set_wakeup_fd`), because Python runs handlers only between two
bytecodes of the main thread, which may be a minute inside one compilation.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pipeline.exit_codes import ExitCode

# After the drain's own deadline, before the process is ended by force: time for one slow fsync.
GRACE_SECONDS = 2.0


class StopRequest:
    """Whether a drain was asked for, by whom, and how many of its seconds are left. Safe from any thread.

    What is done about it is the worker's, between two engine steps. Before `begin_work` there is nothing to
    drain (a model is loading, steps are being compiled), so no seconds are given.
    """

    def __init__(self, drain_seconds: float, *, clock: Callable[[], float] = time.monotonic):
        self._drain_seconds = drain_seconds
        self._clock = clock
        self._event = threading.Event()
        self._deadline: float | None = None
        self._has_work = False
        self.cause: str | None = None

    def begin_work(self) -> None:
        """From here on a drain has its seconds."""
        self._has_work = True

    def ask(self, cause: str) -> None:
        """Ask for a drain; the first cause and its deadline stand."""
        if self._event.is_set():
            return
        self.cause = cause
        self._deadline = self._clock() + (self._drain_seconds if self._has_work else 0.0)
        self._event.set()

    @property
    def is_asked(self) -> bool:
        return self._event.is_set()

    @property
    def seconds_left(self) -> float:
        """Seconds until the drain must be over; infinite while none was asked for."""
        return float("inf") if self._deadline is None else self._deadline - self._clock()


class HandleSignals:
    """Within the block SIGTERM and SIGINT call `stop.ask`; then a second SIGINT ends the process at once.

    So does a drain that is still not over `GRACE_SECONDS` after its deadline. Ending at once is safe: what is
    committed is whole on disk, and a dead process's lease is taken over without waiting. Outside the main
    thread (a notebook's worker) Python allows no handlers and none are set.
    """

    def __init__(self, stop: StopRequest):
        self._stop = stop
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self._stop
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            # A handler that does nothing: it is needed for the signal's number to reach the reader.
            self._previous[number] = signal.signal(number, lambda *_: None)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="tidemill-signals", daemon=True)
        self._thread.start()
        return self._stop

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._previous:
            return
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.close()  # the reader sees the end and its thread returns
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        timeout = None  # a stop that the program asked for itself is not enforced
        while True:
            ready, _, _ = select.select([self._reader], [], [], timeout)
            if not ready:
                end_now(ExitCode.DRAINED, "stopped before the end of a long step")
            numbers = self._reader.recv(64)
            if not numbers:
                return
            for number in numbers:
                if number == signal.SIGINT and self._stop.is_asked:
                    end_now(ExitCode.STOPPED_AT_ONCE, "stopped at once")
                elif number in self._previous:
                    self._stop.ask(signal.Signals(number).name)
                    timeout = max(self._stop.seconds_left + GRACE_SECONDS, 0.0)


def end_now(code: ExitCode, why: str) -> None:
    """End the process where it stands, saying why."""
    sys.stderr.write(f"\n{why}: committed chunks are kept, the same command resumes\n")
    sys.stderr.flush()
    os._exit(code)
