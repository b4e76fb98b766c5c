"""Sliding windows against a plain list of all that was used, and what they promise whatever they are made
of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.server.key_limits import (
    SLOTS_PER_WINDOW,
    WINDOW_SECONDS,
    KeyLimits,
    KeyMeter,
    SlidingWindow,
)

LENGTH_S = 60

steps = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 50)), min_size=1, max_size=60)
"""(seconds since the step before, amount)"""


def with_times(given_steps: list[tuple[float, int]], start: float = 1e9) -> list[tuple[float, int]]:
    times, now = [], start
    for seconds, amount in given_steps:
        now += seconds
        times.append((now, amount))
    return times


def plain_used(events: list[tuple[float, int]], now: float, length_s: int = LENGTH_S) -> int:
    """All that counts at `now`: each event until the end of its slot is `length_s` ago."""
    slot_s = length_s / SLOTS_PER_WINDOW
    return sum(amount for at, amount in events if (at // slot_s + 1) * slot_s + length_s > now)


@given(steps, st.sampled_from(list(WINDOW_SECONDS.values())))
def test_a_window_sums_what_a_plain_list_sums(given_steps: list[tuple[float, int]], length_s: int):
    window, events = SlidingWindow(length_s), []
    scaled = [(seconds * length_s / 60, amount) for seconds, amount in given_steps]
    for now, amount in with_times(scaled):
        assert window.used(now) == plain_used(events, now, length_s)
        window.add(amount, now)
        events.append((now, amount))
        assert window.used(now) == plain_used(events, now, length_s)
        assert len(window.slots()) <= SLOTS_PER_WINDOW + 1


@given(steps, st.integers(1, 60))
def test_no_interval_holds_more_than_a_limit_that_is_kept(given_steps: list[tuple[float, int]], limit: int):
    window, admitted = SlidingWindow(LENGTH_S), []
    for now, _ in with_times([(seconds / 30, amount) for seconds, amount in given_steps * 4]):
        if window.seconds_until(limit - 1, now) == 0.0:
            window.add(1, now)
            admitted.append(now)
    for first in admitted:
        assert sum(first <= at <= first + LENGTH_S for at in admitted) <= limit


@given(steps, st.integers(0, 100))
def test_after_waiting_as_long_as_told_there_is_room_and_not_before(
    given_steps: list[tuple[float, int]], most: int
):
    window, now = SlidingWindow(LENGTH_S), 0.0
    for now, amount in with_times(given_steps):
        window.add(amount, now)
    wait = window.seconds_until(most, now)
    if wait == 0.0:
        assert window.used(now) <= most
        return
    assert wait <= LENGTH_S + LENGTH_S / SLOTS_PER_WINDOW
    assert SlidingWindow(LENGTH_S, window.slots()).used(now + wait - 1e-3) > most
    assert window.used(now + wait) <= most


@given(steps)
def test_a_window_goes_on_from_what_it_stored(given_steps: list[tuple[float, int]]):
    window, now = SlidingWindow(LENGTH_S), 0.0
    for now, amount in with_times(given_steps):
        window.add(amount, now)
    again = SlidingWindow(LENGTH_S, window.slots())
    for later in (0.0, 1.0, 30.5, 61.0):
        assert again.used(now + later) == window.used(now + later)


def test_a_window_stored_by_a_clock_that_was_ahead_still_ends():
    window = SlidingWindow(LENGTH_S)
    window.add(5, 2e9)
    again = SlidingWindow(LENGTH_S, window.slots())
    assert again.used(1e9) == 5
    assert again.used(1e9 + 62) == 0


def test_each_limit_stands_for_itself():
    for name in KeyLimits().__dataclass_fields__:
        meter = KeyMeter(KeyLimits(**{name: 2}))
        for _ in range(2):
            assert meter.exceeded(100.0) is None
            meter.add_request(100.0)
            meter.add_tokens(1, 0, 100.0)
            meter.in_flight += 1
        exceeded = meter.exceeded(100.0)
        assert exceeded is not None, name
        assert exceeded.limit == 2
        assert (exceeded.retry_after_s is None) == name.endswith("lifetime")
        if exceeded.retry_after_s is not None and name != "max_concurrent":
            assert meter.exceeded(100.0 + exceeded.retry_after_s) is None


def test_of_two_limits_the_longer_wait_is_told():
    meter = KeyMeter(KeyLimits(requests_per_minute=1, requests_per_hour=1))
    meter.add_request(0.0)
    exceeded = meter.exceeded(0.0)
    assert exceeded is not None
    assert exceeded.window == "hour"


@pytest.mark.parametrize(
    "bad", [{"requests_per_minute": 0}, {"tokens_per_day": -1}, {"max_concurrent": True}]
)
def test_a_limit_is_a_whole_number_of_at_least_one(bad: dict[str, int]):
    with pytest.raises(ConfigError, match="at least 1"):
        KeyLimits.from_mapping(bad)


def test_an_unknown_limit_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'requests_per_minute'"):
        KeyLimits.from_mapping({"request_per_minutes": 5})
