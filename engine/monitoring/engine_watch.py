"""Counts what one engine does: what it says itself is read when asked for, the rest is seen as it happens."""

from __future__ import annotations

import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from engine.monitoring import definitions as of
from engine.monitoring.definitions import Definition, Sample
from engine.monitoring.histogram import Histogram
from engine.observer import EngineObserver, StepFacts

if TYPE_CHECKING:
    from engine.outputs import EngineStats, RequestOutput
    from engine.sampling_params import SamplingParams

RATE_SECONDS = 10.0
_RATE_SPACING_S = 0.25
# Latencies shown as percentiles are those of the last requests.
RECENT_REQUESTS = 512

_HISTOGRAMS = (
    of.REQUEST_DURATION,
    of.REQUEST_QUEUE,
    of.FIRST_TOKEN,
    of.INTER_TOKEN,
    of.REQUEST_PROMPT_TOKENS,
    of.REQUEST_GENERATED_TOKENS,
    of.SCHEDULE_DURATION,
    of.EXECUTION_DURATION,
)
# Reported from the start, so that a rate sees the first one.
_STATUSES: tuple[str, ...] = ("completed", "aborted", "timeout")
# Finish reasons of requests that were ended from outside, and the status that they make.
_CUT_SHORT = {"timeout": "timeout", "abort": "aborted"}


@dataclass(frozen=True, slots=True)
class EngineNow:
    """What an engine has done so far, and is doing: one look, for the console and the dashboard."""

    stats: EngineStats
    num_active: int
    """Requests that have not ended."""
    num_ended: dict[str, int]
    """Requests by status."""
    tokens_per_second: float
    first_token_seconds: tuple[float, ...]
    """Of the last finished requests; likewise the next two."""
    inter_token_seconds: tuple[float, ...]
    duration_seconds: tuple[float, ...]


class EngineWatch(EngineObserver):
    """Made by `Metrics.watch`, which puts it among the engine's observers. Read from any thread."""

    def __init__(self, engine: Any, name: str, clock: Callable[[], float] = time.monotonic):
        self.engine = engine
        self.name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._num_received = 0
        self._ended: Counter[str] = Counter(dict.fromkeys(_STATUSES, 0))
        self._finish_reasons = Counter({"stop": 0, "length": 0})
        self._histograms = {each: Histogram(each.buckets) for each in _HISTOGRAMS}
        self._step_sequences = 0
        self._last_step = StepFacts(0, 0, 0.0, 0.0)
        self._first_token: deque[float] = deque(maxlen=RECENT_REQUESTS)
        self._inter_token: deque[float] = deque(maxlen=RECENT_REQUESTS)
        self._duration: deque[float] = deque(maxlen=RECENT_REQUESTS)
        # (time, tokens generated until then), oldest first; the first may be older than the window.
        self._stepped_at = clock()
        self._generated = deque([(self._stepped_at, engine.totals().num_generated_tokens)])

    # -- what happens, on the stepping thread ------------------------------------------------------

    def on_added(self, request_id: str, num_prompt_tokens: int, sampling: SamplingParams) -> None:
        with self._lock:
            self._num_received += 1

    def on_scheduled(self, seconds: float) -> None:
        with self._lock:
            self._histograms[of.SCHEDULE_DURATION].add(seconds)

    def on_step(self, facts: StepFacts) -> None:
        with self._lock:
            self._histograms[of.EXECUTION_DURATION].add(facts.execution_seconds)
            self._step_sequences += facts.num_sequences
            self._last_step = facts
            now = self._stepped_at = self._clock()
            if now - self._generated[-1][0] >= _RATE_SPACING_S:
                self._generated.append((now, self.engine.totals().num_generated_tokens))
                self._forget_before(now - RATE_SECONDS)

    def on_finished(self, output: RequestOutput) -> None:
        lens = [len(sample.token_ids) for sample in output.outputs]
        times = output.metrics
        with self._lock:
            for sample in output.outputs:
                self._finish_reasons[sample.finish_reason or "none"] += 1
            reasons = {sample.finish_reason for sample in output.outputs}
            self._ended[next((_CUT_SHORT[each] for each in _CUT_SHORT if each in reasons), "completed")] += 1
            self._histograms[of.REQUEST_PROMPT_TOKENS].add(len(output.prompt_token_ids))
            self._histograms[of.REQUEST_GENERATED_TOKENS].add(sum(lens))
            if times.first_scheduled_time is not None:
                waited = times.first_scheduled_time - times.arrival_time
                self._histograms[of.REQUEST_QUEUE].add(waited)
            if times.first_token_time is not None:
                seconds = times.first_token_time - times.arrival_time
                self._histograms[of.FIRST_TOKEN].add(seconds)
                self._first_token.append(seconds)
            if times.finished_time is not None:
                seconds = times.finished_time - times.arrival_time
                self._histograms[of.REQUEST_DURATION].add(seconds)
                self._duration.append(seconds)
                if times.first_token_time is not None and max(lens, default=0) > 1:
                    mean = (times.finished_time - times.first_token_time) / (max(lens) - 1)
                    self._histograms[of.INTER_TOKEN].add(mean, sum(num - 1 for num in lens if num > 1))
                    self._inter_token.append(mean)

    def on_aborted(self, request_id: str) -> None:
        with self._lock:
            self._ended["aborted"] += 1

    # -- what is asked, on any thread --------------------------------------------------------------

    def now(self) -> EngineNow:
        """One look at it."""
        stats = self.engine.totals()
        with self._lock:
            return EngineNow(
                stats=stats,
                num_active=self.engine.num_unfinished,
                num_ended=dict(self._ended),
                tokens_per_second=self._rate(stats.num_generated_tokens),
                first_token_seconds=tuple(self._first_token),
                inter_token_seconds=tuple(self._inter_token),
                duration_seconds=tuple(self._duration),
            )

    def samples(self) -> Iterator[Sample]:
        """The values of `OBSERVED` and `PULLED`."""
        stats = self.engine.totals()
        for definition, read in of.PULLED:
            yield Sample(definition, (self.name,), read(stats))
        yield from self._observed(stats)

    def _observed(self, stats: EngineStats) -> list[Sample]:
        def one(definition: Definition, value: float, *labels: str) -> Sample:
            return Sample(definition, (self.name, *labels), value)

        hit_rate = stats.num_cached_tokens / stats.num_prompt_tokens if stats.num_prompt_tokens else 0.0
        with self._lock:
            return [
                *[one(of.REQUESTS, count, status) for status, count in self._ended.items()],
                *[one(of.COMPLETIONS, count, reason) for reason, count in self._finish_reasons.items()],
                one(of.REQUESTS_RECEIVED, self._num_received),
                one(of.STEP_SEQUENCES, self._step_sequences),
                one(of.BATCH_SIZE, self._last_step.num_sequences),
                one(of.SCHEDULED_TOKENS, self._last_step.num_tokens),
                one(of.TOKENS_PER_SECOND, self._rate(stats.num_generated_tokens)),
                one(of.CACHE_HIT_RATE, hit_rate),
                *[Sample(each, (self.name,), held.read()) for each, held in self._histograms.items()],
                one(of.SYSTEM_INFO, 1, self.engine.model_name, stats.device, *versions()),
            ]

    def _rate(self, num_generated: int) -> float:
        """Tokens a second over the window; while it is idle nothing is added to it, and the rate falls."""
        now = self._clock()
        if num_generated != self._generated[-1][1]:  # by steps since the last entry
            self._generated.append((self._stepped_at, num_generated))
        self._forget_before(now - RATE_SECONDS)
        since, before = self._generated[0]
        seconds = now - max(since, now - RATE_SECONDS)
        return max(0, num_generated - before) / seconds if seconds > 0 else 0.0

    def _forget_before(self, moment: float) -> None:
        """Keep one from before the window: how many tokens there were when it began."""
        while len(self._generated) > 1 and self._generated[1][0] <= moment:
            self._generated.popleft()


@cache
def versions() -> tuple[str, str, str]:
    """Of Tidemill, JAX and Python."""
    found = []
    for package in ("tidemill", "jax"):
        try:
            found.append(version(package))
        except PackageNotFoundError:  # run from a checkout that was never installed
            found.append("unknown")
    return found[0], found[1], platform.python_version()
