"""Requests to a store: counted as they are sent, and spread so that no more than so many a second are."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping


class RequestMeter:
    """`max_per_second` None does not limit. Counting is safe from any thread, `admit` is for event loops."""

    def __init__(self, max_per_second: float | None = None, clock: Callable[[], float] = time.monotonic):
        self._interval = 1.0 / max_per_second if max_per_second else 0.0
        self._clock = clock
        self._next = clock()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    async def admit(self, kind: str) -> None:
        """Wait for the request's turn, and count it. A store that was left alone owes no burst."""
        with self._lock:
            self._counts[kind] += 1
            turn = max(self._next, self._clock())
            self._next = turn + self._interval
        if (seconds := turn - self._clock()) > 0:
            await asyncio.sleep(seconds)

    def take(self) -> Mapping[str, int]:
        """Requests by kind since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts
