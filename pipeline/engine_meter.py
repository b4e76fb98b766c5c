"""Meter an engine as a whole: what its steps took and used since it was last settled with a chunk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from engine.outputs import EngineStats, RequestOutput
from pipeline.metrics import Metrics
from pipeline.open_work import Refusal


class EngineMeter:
    """Counts between settlements; `settle` moves everything counted so far to one chunk's metrics.

    The engine's totals only grow, so what happened since the last look is a difference. The first look takes
    all of it: compilation at the engine's start is the first chunk's.
    """

    def __init__(self, engine: Any, max_num_seqs: int, clock: Callable[[], float] = time.monotonic):
        self._engine = engine
        self._max_num_seqs = max_num_seqs
        self._clock = clock
        self._pending = Metrics()
        self._settled_at = clock()
        self._num_steps = 0
        self._evictions = 0
        self._preemptions = 0
        self._compile_seconds = 0.0
        self._computed_tokens = 0
        self._padded_tokens = 0
        self._duplicates = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._recent: deque[float] = deque(maxlen=8)

    def step(self) -> Sequence[RequestOutput | Refusal]:
        """One engine step, counted."""
        started = self._clock()
        outputs = self._engine.step()
        seconds = self._clock() - started
        self._recent.append(seconds)
        stats = self._look()
        widths = stats.batch_occupancy
        if widths and not stats.waiting and 2 * widths[-1] < self._max_num_seqs:
            self._pending.tail_seconds += seconds
        num_pages = stats.pages_free + stats.pages_cached + stats.pages_held
        if num_pages:
            self._pending.page_use.add(stats.pages_held / num_pages)
        return outputs

    @property
    def step_seconds(self) -> float:
        """What the next step may take: the longest of the last few."""
        return max(self._recent, default=0.0)

    def waited(self, seconds: float) -> None:
        """The engine was idle for want of rows."""
        self._pending.wait_seconds += seconds

    def settle(self, metrics: Metrics) -> None:
        """Count everything since the last settlement in `metrics`."""
        self._look()
        now = self._clock()
        self._pending.wall_seconds = now - self._settled_at
        self._settled_at = now
        metrics.merge(self._pending)
        self._pending = Metrics()

    def _look(self) -> EngineStats:
        stats, pending = self._engine.stats(), self._pending
        pending.num_steps += stats.num_steps - self._num_steps
        pending.evictions += stats.evictions - self._evictions
        pending.preemptions += stats.preemptions - self._preemptions
        pending.computed_tokens += stats.num_computed_tokens - self._computed_tokens
        pending.padded_tokens += stats.num_padded_tokens - self._padded_tokens
        self._computed_tokens, self._padded_tokens = stats.num_computed_tokens, stats.num_padded_tokens
        pending.duplicates += stats.num_duplicates - self._duplicates
        self._duplicates = stats.num_duplicates
        pending.drafted_tokens += stats.num_drafted_tokens - self._drafted_tokens
        pending.accepted_tokens += stats.num_accepted_tokens - self._accepted_tokens
        self._drafted_tokens, self._accepted_tokens = stats.num_drafted_tokens, stats.num_accepted_tokens
        pending.compile_seconds += stats.compile_seconds - self._compile_seconds
        self._num_steps, self._evictions = stats.num_steps, stats.evictions
        self._preemptions, self._compile_seconds = stats.preemptions, stats.compile_seconds
        for seconds in stats.step_seconds:
            pending.step_seconds.add(seconds)
        for num_seqs in stats.batch_occupancy:
            pending.occupancy.add(num_seqs / self._max_num_seqs)
        return stats
