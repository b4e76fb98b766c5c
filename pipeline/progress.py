"""Progress while a job runs: a tqdm bar on a terminal, one plain line each 30 seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TextIO

from tqdm import tqdm

ProgressStyle = Literal["auto", "bar", "lines", "off"]

# The time left follows from the rows that were generated in so many of the last seconds.
RATE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a job is. `rows_total` counts all rows of all shards; tokens are of this attempt only."""

    rows_done: int
    rows_total: int
    rows_rejected: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int

    @property
    def rows_generated(self) -> int:
        return self.rows_done - self.rows_rejected

    @property
    def hit_rate(self) -> float | None:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


class Progress:
    """Shows a `Standing` whenever it is updated, not more often than is worth a line."""

    def __init__(
        self,
        style: ProgressStyle,
        start: Standing,
        *,
        line_seconds: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = stream or sys.stderr
        self._style = ("bar" if self._stream.isatty() else "lines") if style == "auto" else style
        self._line_seconds = line_seconds
        self._clock = clock
        self._started = self._last_line = clock()
        self._recent = deque([(self._started, start)])  # standings of the last RATE_SECONDS, oldest first
        self._bar: tqdm | None = None
        if self._style == "bar":
            self._bar = tqdm(
                total=start.rows_total,
                initial=start.rows_done,
                unit="row",
                file=self._stream,
                dynamic_ncols=True,
                # Rejects take no time and rows finish in bursts, so tqdm's own rate and time left mislead.
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows [{elapsed}{postfix}]",
            )

    def update(self, standing: Standing) -> None:
        """Show `standing`: at once on a bar, each `line_seconds` as a line."""
        self._recent.append((self._clock(), standing))
        while len(self._recent) > 2 and self._recent[1][0] <= self._clock() - RATE_SECONDS:
            self._recent.popleft()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rates(standing)}, {self._left(standing)}", refresh=False)
            self._bar.update(standing.rows_done - self._bar.n)
        elif self._style == "lines" and self._clock() - self._last_line >= self._line_seconds:
            self._last_line = self._clock()
            self._stream.write(self._line(standing) + "\n")
            self._stream.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rates(self, standing: Standing) -> str:
        seconds = max(self._clock() - self._started, 1e-9)
        parts = [f"{standing.generated_tokens / seconds:,.0f} tokens/s"]
        if standing.hit_rate is not None:
            parts.append(f"{standing.hit_rate:.0%} cached")
        if standing.rows_rejected:
            parts.append(f"{standing.rows_rejected:,} rejected")
        return ", ".join(parts)

    def _line(self, standing: Standing) -> str:
        share = standing.rows_done / standing.rows_total if standing.rows_total else 1.0
        rows = f"{standing.rows_done:,} of {standing.rows_total:,} rows ({share:.0%})"
        return f"{rows}, {self._rates(standing)}, {self._left(standing)}"

    def _left(self, standing: Standing) -> str:
        moment, before = self._recent[0]
        num_generated = standing.rows_generated - before.rows_generated
        if num_generated <= 0:
            return "time left unknown"
        seconds = (self._clock() - moment) / num_generated * (standing.rows_total - standing.rows_done)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole_seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
