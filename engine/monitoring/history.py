"""The last minutes of every engine, a point a second: what the console and the dashboard show."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.monitoring.engine_watch import EngineNow, EngineWatch
    from engine.monitoring.metrics import Metrics

INTERVAL_S = 1.0
MAX_POINTS = 900


@dataclass(frozen=True, slots=True)
class Point:
    """An engine at one moment. Rates are since the point before; None where there is nothing to divide by."""

    number: int
    """Of this engine's points, from 0: a reader asks for those after the last one it has."""
    unix_time: float
    requests_per_second: float
    generated_per_second: float
    prompt_per_second: float
    hit_rate: float | None
    """Share of the prompt tokens that came since, found in the prefix cache."""
    running: int
    waiting: int
    pages_used: int
    pages_cached: int
    pages_total: int
    first_token_p50: float | None
    """Seconds, of the last finished requests (`RECENT_REQUESTS`); likewise the rest."""
    first_token_p95: float | None
    inter_token_p50: float | None
    inter_token_p95: float | None
    duration_p50: float | None
    duration_p95: float | None


class EngineHistory:
    """Points of one engine. One thread adds, any reads."""

    def __init__(self, watch: EngineWatch, max_points: int = MAX_POINTS):
        self.watch = watch
        self._points: deque[Point] = deque(maxlen=max_points)
        self._num_points = 0
        self._before: tuple[float, EngineNow] | None = None

    def look(self, monotonic: float, unix_time: float) -> None:
        """Add a point; the first look only remembers where the counters stand."""
        now = self.watch.now()
        if self._before is not None and monotonic > self._before[0]:
            self._points.append(self._point(now, monotonic, unix_time))
            self._num_points += 1
        self._before = (monotonic, now)

    @property
    def last_number(self) -> int:
        """Of the last point; -1 before there is one."""
        return self._num_points - 1

    def points(self, after: int = -1) -> list[Point]:
        """Those that are kept, oldest first, past number `after`."""
        return [point for point in self._points.copy() if point.number > after]

    def _point(self, now: EngineNow, monotonic: float, unix_time: float) -> Point:
        assert self._before is not None, "rates are between two looks"
        seconds, before = monotonic - self._before[0], self._before[1]
        stats, earlier = now.stats, before.stats

        def grew(name: str) -> int:
            """Of an engine that was given another model in between, what it has done since."""
            return max(0, getattr(stats, name) - getattr(earlier, name))

        num_prompt, num_cached = grew("num_prompt_tokens"), grew("num_cached_tokens")
        num_ended = sum(now.num_ended.values()) - sum(before.num_ended.values())
        return Point(
            number=self._num_points,
            unix_time=unix_time,
            requests_per_second=num_ended / seconds,
            generated_per_second=grew("num_generated_tokens") / seconds,
            prompt_per_second=num_prompt / seconds,
            hit_rate=min(num_cached / num_prompt, 1.0) if num_prompt > 0 else None,
            running=stats.running,
            waiting=stats.waiting,
            pages_used=stats.pages_held,
            pages_cached=stats.pages_cached,
            pages_total=stats.pages_free + stats.pages_cached + stats.pages_held,
            first_token_p50=percentile(now.first_token_seconds, 0.5),
            first_token_p95=percentile(now.first_token_seconds, 0.95),
            inter_token_p50=percentile(now.inter_token_seconds, 0.5),
            inter_token_p95=percentile(now.inter_token_seconds, 0.95),
            duration_p50=percentile(now.duration_seconds, 0.5),
            duration_p95=percentile(now.duration_seconds, 0.95),
        )


class History:
    """Looks at all engines of `metrics` once a second, from a thread that ends with them.

    start: False only in tests, which look themselves.
    """

    def __init__(self, metrics: Metrics, *, start: bool = True, clock: Callable[[], float] = time.monotonic):
        self._metrics = weakref.ref(metrics)
        self._clock = clock
        self._lock = threading.Lock()
        self._engines: dict[str, EngineHistory] = {}
        if start:
            self.look()
            thread = threading.Thread(
                target=_look_on, args=(weakref.ref(self),), name="tidemill-history", daemon=True
            )
            thread.start()

    @property
    def engines(self) -> dict[str, EngineHistory]:
        """By name, those that are watched now."""
        with self._lock:
            return dict(self._engines)

    def look(self) -> None:
        """Add a point for each engine that is watched."""
        metrics = self._metrics()
        watches = metrics.watches if metrics is not None else []
        with self._lock:
            known = self._engines
            self._engines = {}
            for watch in watches:
                history = known.get(watch.name)
                if history is None or history.watch is not watch:
                    history = EngineHistory(watch)
                self._engines[watch.name] = history
                history.look(self._clock(), time.time())


def _look_on(history: weakref.ref[History]) -> None:
    """Until nobody holds the history any more."""
    while True:
        time.sleep(INTERVAL_S)
        held = history()
        if held is None:
            return
        held.look()
        del held


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of all are not above (nearest rank); None of none."""
    if not values:
        return None
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]
