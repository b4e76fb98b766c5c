"""What a job says when it ends: what was made, how fast, where, and how to open it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.metrics import Metrics
from pipeline.progress import duration


@dataclass(frozen=True, slots=True)
class Outcome:
    """`overall` counts what is committed by all attempts together, `here` what this one committed.

    `duplicates` are exact duplicates among the rows that are ok (pipeline/exact_duplicates.py).
    """

    overall: Metrics
    here: Metrics
    duplicates: int
    rows_total: int
    seconds: float
    output: str
    is_finished: bool


def summary_lines(outcome: Outcome) -> list[str]:
    """The summary, a line each."""
    overall, here = outcome.overall, outcome.here
    rejected = f", {overall.rows_rejected:,} rejected" if overall.rows_rejected else ""
    duplicates = f" ({outcome.duplicates:,} exact duplicates)" if outcome.duplicates else ""
    rows = f"{overall.rows_ok:,} ok{duplicates}{rejected}, of {outcome.rows_total:,}"
    lines = ["", f"  rows      {rows}"]
    if overall.rejected:
        lines.append(f"  rejected  {by_count(overall.rejected)}")
    if overall.finish_reasons:
        lines.append(f"  finished  {by_count(overall.finish_reasons)}")
    cached = "" if overall.hit_rate is None else f" ({overall.hit_rate:.0%} from the prefix cache)"
    lines.append(f"  tokens    {overall.prompt_tokens:,} in{cached}, {overall.generated_tokens:,} out")
    lines.append(f"  time      {_time(outcome, here)}")
    if here.store_requests:
        lines.append(f"  requests  {by_count(here.store_requests)}")
    lines.append(f"  output    {outcome.output}")
    if outcome.is_finished:
        lines.append(f'  open it   from pipeline.results import open_run; run = open_run("{outcome.output}")')
    return lines


def _time(outcome: Outcome, here: Metrics) -> str:
    if not here.rows_in:
        return f"{duration(outcome.seconds)}; everything here was made before"
    running = here.wall_seconds or outcome.seconds
    made_before = outcome.overall.rows_in - here.rows_in
    parts = [
        f"{duration(outcome.seconds)}, of which {duration(running)} generating: "
        f"{here.generated_tokens / running:,.0f} tokens/s out, {here.prompt_tokens / running:,.0f} in"
    ]
    if here.compile_seconds >= 0.05:
        parts.append(f"compiling {duration(here.compile_seconds)}")
    if made_before > 0:
        parts.append(f"{made_before:,} rows were there before")
    return "; ".join(parts)


def by_count(counts: Mapping[str, int]) -> str:
    """`stop 12, length 3`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in ordered)
