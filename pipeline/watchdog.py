"""A step that never comes back (a hung device, driver or kernel) ends the process, so that the run goes on.

Nothing can be drained then: the thread that would do it is inside the step. What is committed is whole, and
the leases are left as a crash leaves them: they are taken over, and rows that hang the device again and again
are found (pipeline/suspects.py).
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.exit_codes import ExitCode

_TICKS = 10


class StepWatchdog:
    """Within its block, a `watched` action that takes longer than `timeout_s` ends the process with code 75.

    Only what is watched counts: engines compile when they are made, which is not watched. A process that was
    itself stopped for a while (SIGSTOP, a laptop's lid) has not waited: each look counts for two ticks at
    most. `on_hang` is called with the seconds waited instead of ending the process.
    """

    def __init__(self, timeout_s: float, on_hang: Callable[[float], None] | None = None):
        self._timeout_s = timeout_s
        self._tick_s = timeout_s / _TICKS
        self._on_hang = on_hang or self._end_process
        self._number = 0  # odd while an action is watched, another one each time
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="tidemill-watchdog", daemon=True)

    def __enter__(self) -> StepWatchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._number += 1
        try:
            yield
        finally:
            self._number += 1

    def _look(self) -> None:
        number, waited, looked_at = self._number, 0.0, time.monotonic()
        while not self._over.wait(self._tick_s):
            now = time.monotonic()
            if number != self._number or number % 2 == 0:
                number, waited = self._number, 0.0
            else:
                waited += min(now - looked_at, 2 * self._tick_s)
            looked_at = now
            if waited >= self._timeout_s:
                self._on_hang(waited)
                return

    def _end_process(self, seconds: float) -> None:
        sys.stderr.write(
            f"\ntidemill: error: a step of the engine has not come back for {seconds:.0f} s "
            f"(step_timeout_s={self._timeout_s:g}): the device or its driver hangs. Committed chunks are "
            "kept: start the same command again, and raise step_timeout_s if steps really take so long. The "
            "process was here:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(ExitCode.RETRY_LATER)
