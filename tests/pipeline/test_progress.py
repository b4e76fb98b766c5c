"""A bar on a terminal, a line each half minute elsewhere, nothing when asked for nothing."""

from __future__ import annotations

import io

import pytest

from pipeline.metrics import Metrics
from pipeline.progress import Progress, ProgressStyle, Standing, duration
from pipeline.summary import Outcome, summary_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def standing(rows_done: int, rejected: int = 0) -> Standing:
    return Standing(
        rows_done, 1000, rejected, prompt_tokens=100, cached_tokens=80, generated_tokens=rows_done * 10
    )


def show(style: ProgressStyle, stream: io.StringIO, seconds: list[float]) -> str:
    """What 100 rows a second look like, updated at these moments."""
    now = 0.0
    with Progress(style, standing(0), line_seconds=30.0, stream=stream, clock=lambda: now) as progress:
        for moment in seconds:
            now = moment
            progress.update(standing(int(moment)))
    return stream.getvalue()


def test_without_a_terminal_there_is_a_line_each_half_minute() -> None:
    shown = show("auto", io.StringIO(), [float(second) for second in range(1, 101)]).splitlines()
    assert len(shown) == 3
    assert shown[0] == "30 of 1,000 rows (3%), 10 tokens/s, 80% cached, 16 min 10 s left"


def test_a_terminal_gets_a_bar() -> None:
    shown = show("auto", Terminal(), [1.0, 500.0])
    assert "\r" in shown
    assert "500/1000 rows" in shown
    assert "left" in shown
    assert "80% cached" in shown


def test_off_is_silent() -> None:
    assert show("off", Terminal(), [1.0, 100.0]) == ""


def test_time_left_counts_only_the_rows_of_this_attempt() -> None:
    stream, now = io.StringIO(), 0.0
    progress = Progress("lines", standing(900), line_seconds=1.0, stream=stream, clock=lambda: now)
    now = 10.0
    progress.update(standing(913, rejected=3))
    assert "1 min 27 s left" in stream.getvalue()
    assert "3 rejected" in stream.getvalue()


def test_time_left_follows_the_last_two_minutes() -> None:
    stream, now = io.StringIO(), 0.0
    progress = Progress("lines", standing(0), line_seconds=1.0, stream=stream, clock=lambda: now)
    for now, rows in ((600.0, 10), (660.0, 70), (720.0, 130), (780.0, 190)):  # noqa: B007 - the clock reads it
        progress.update(standing(rows))
    # One row a second lately, however slow the beginning was.
    assert stream.getvalue().splitlines()[-1].endswith("13 min 30 s left")


def test_no_rows_done_means_time_left_is_unknown() -> None:
    stream, now = io.StringIO(), 0.0
    progress = Progress("lines", standing(5), line_seconds=1.0, stream=stream, clock=lambda: now)
    now = 10.0
    progress.update(standing(5))
    assert "time left unknown" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7380, "2 h 03 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_summary_tells_this_attempt_from_the_ones_before() -> None:
    here = Metrics(rows_in=4, rows_ok=4, prompt_tokens=40, generated_tokens=80, wall_seconds=2.0)
    overall = Metrics(rows_in=10, rows_ok=8, rejected={"b": 1, "a": 1}, prompt_tokens=100, cached_tokens=75)
    shown = "\n".join(summary_lines(Outcome(overall, here, 0, 10, 3.0, "/out", is_finished=True)))
    assert "8 ok, 2 rejected, of 10" in shown
    assert "rejected  a 1, b 1" in shown
    assert "75% from the prefix cache" in shown
    assert "40 tokens/s out, 20 in" in shown
    assert "6 rows were there before" in shown
    shown = "\n".join(summary_lines(Outcome(overall, here, 3, 10, 3.0, "/out", is_finished=True)))
    assert "8 ok (3 exact duplicates), 2 rejected, of 10" in shown
