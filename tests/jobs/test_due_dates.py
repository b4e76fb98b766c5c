"""Which dates are due."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from jobs.due_dates import before, beginning, due_dates, name_of

EVERY = ["hour", "day", "week", "month"]
MOMENTS = st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1))


@given(MOMENTS, st.sampled_from(EVERY))
def test_a_date_is_written_as_it_is_read_and_holds_its_moment(moment: datetime, every: Any):
    start = beginning(name_of(moment, every), every)
    assert name_of(start, every) == name_of(moment, every)
    assert start <= moment
    assert name_of(start - timedelta(seconds=1), every) == name_of(before(start, every), every)
    assert name_of(start - timedelta(seconds=1), every) != name_of(start, every)


@given(MOMENTS, st.sampled_from(EVERY), st.integers(0, 40), st.integers(0, 3), st.integers(1, 50))
def test_dates_follow_each_other_up_to_now(moment: datetime, every: Any, back: int, lag: int, most: int):
    first = beginning(name_of(moment, every), every)
    for _ in range(back):
        first = before(first, every)
    since = name_of(first, every)
    dates = due_dates(moment, every, since=since, lag=lag, max_dates=most)
    assert len(dates) == min(max(back + 1 - lag, 0), most)
    starts = [beginning(date, every) for date in dates]
    assert all(before(b, every) == a for a, b in pairwise(starts))
    if lag == 0:
        assert dates[-1] == name_of(moment, every)


def test_names_of_dates():
    moment = datetime(2026, 11, 28, 5, 30)
    names = [name_of(moment, every) for every in EVERY]  # type: ignore[arg-type]
    assert names == ["2026-11-28T05", "2026-11-28", "2026-W48", "2026-11"]
    assert due_dates(datetime(2027, 1, 2), "week", since="2026-W52", lag=0, max_dates=9) == [
        "2026-W52",
        "2026-W53",
    ]


def test_without_a_first_date_only_the_newest_is_due():
    assert due_dates(datetime(2026, 11, 28), "day", since=None, lag=1, max_dates=9) == ["2026-11-27"]


@pytest.mark.parametrize("date", ["2026-11-31", "28.11.2026", "2026-1-2", "", "2026-11-28T05"])
def test_what_is_no_date_is_refused(date: str):
    with pytest.raises(ConfigError, match="write it as 2026-11-28"):
        beginning(date, "day")
