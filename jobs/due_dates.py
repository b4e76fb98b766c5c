"""Which dates of a schedule are due: every hour, day, week or month has one, named by when it begins.

hour 2026-11-28T05    day 2026-11-28    week 2026-W48    month 2026-11
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

from engine.errors import ConfigError

Every = Literal["hour", "day", "week", "month"]

# How a date is written, what is added to it to be read back, and by which format.
_FORMS = {
    "hour": ("%Y-%m-%dT%H", "", "%Y-%m-%dT%H"),
    "day": ("%Y-%m-%d", "", "%Y-%m-%d"),
    "week": ("%G-W%V", "-1", "%G-W%V-%u"),
    "month": ("%Y-%m", "", "%Y-%m"),
}


def name_of(moment: datetime, every: Every) -> str:
    """The date that `moment` belongs to."""
    return moment.strftime(_FORMS[every][0])


def beginning(date: str, every: Every) -> datetime:
    """When a date begins, without a time zone. Raises ConfigError unless it is written as `name_of` would."""
    _, suffix, form = _FORMS[every]
    try:
        found = datetime.strptime(date + suffix, form)
    except ValueError:
        found = None
    if found is None or name_of(found, every) != date:
        example = name_of(datetime(2026, 11, 28, 5), every)
        raise ConfigError(f"{date!r} is no date of a schedule for every {every}: write it as {example}")
    return found


def before(start: datetime, every: Every) -> datetime:
    """The beginning of the date before the one that begins at `start`."""
    if every == "month":
        return (start - timedelta(days=1)).replace(day=1)
    return start - {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(days=7)}[every]


def due_dates(now: datetime, every: Every, *, since: str | None, lag: int, max_dates: int) -> list[str]:
    """The dates that are due at `now` (a wall clock's reading in the schedule's time zone), oldest first.

    The newest is the one `lag` dates before the current one. With `since` all from there on are due, though
    never more than the newest `max_dates`; without, only the newest.
    """
    start = beginning(name_of(now, every), every)
    for _ in range(lag):
        start = before(start, every)
    first = start if since is None else beginning(since, every)
    dates: list[str] = []
    while start >= first and len(dates) < max_dates:
        dates.append(name_of(start, every))
        start = before(start, every)
    return dates[::-1]
