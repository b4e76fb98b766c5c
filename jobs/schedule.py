"""`python -m jobs.schedule 'output.path=…/{date}' <overrides>`: the job of each date that is due.

To be started by anything that starts things now and then (jobs/schedules/ has recipes). `{date}` stands for
the date in every override. A date is one run however often it is started: a finished one is left alone, an
unfinished one goes on where it was. Missed dates are caught up with, oldest first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from engine.errors import ConfigError, TidemillError
from jobs.command import exit_code_of, say
from jobs.due_dates import Every, beginning, due_dates
from jobs.publish import PublishSettings, publish, published_as
from jobs.ray.settings import RaySettings
from jobs.run_lock import RunLock
from jobs.sections import section_help, take_section
from pipeline.commits import retrying
from pipeline.compose import compose
from pipeline.exit_codes import ExitCode
from pipeline.run import open_output, run_job
from pipeline.run_state import MANIFEST
from pipeline.settings import KNOWN_KEYS, Settings, from_config
from pipeline.signals import StopRequest
from pipeline.storage import Storage, open_storage

DATE = "{date}"

Launch = Callable[[Settings, StopRequest], ExitCode]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings:
    """every: hour, day, week or month. date: run this one and no other. since: the first date; all later ones
    that were missed are caught up with; null runs the newest only. max_dates: the most that one start catches
    up with, the newest. lag: how many dates to stay behind the clock. timezone: in which dates begin.
    overlap: while another date of the schedule runs: skip (leave it to the next start), queue (wait), or
    cancel (ask it to stop; what it committed is kept, and it is caught up with). launcher: run, in this
    process, or ray, on a cluster (ray.* as for python -m jobs.ray). publish: put each finished run through
    the gate of python -m jobs.publish (publish.* as there).
    """

    every: Every = "day"
    date: str | None = None
    since: str | None = None
    max_dates: int = 31
    lag: int = 0
    timezone: str = "UTC"
    overlap: Literal["skip", "queue", "cancel"] = "skip"
    launcher: Literal["run", "ray"] = "run"
    publish: bool = False

    def __post_init__(self) -> None:
        if self.max_dates < 1:
            raise ConfigError(f"schedule.max_dates={self.max_dates}: must be at least 1")
        if self.lag < 0:
            raise ConfigError(f"schedule.lag={self.lag}: must not be negative")
        for name in ("date", "since"):
            if (date := getattr(self, name)) is not None:
                beginning(date, self.every)
        if self.date is not None and self.since is not None:
            raise ConfigError("schedule.date and schedule.since: give one of them")
        if self.every == "hour" and self.timezone != "UTC":
            raise ConfigError("schedule.every=hour goes by UTC: elsewhere an hour may come twice a year")
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ConfigError(f"schedule.timezone={self.timezone!r}: no such time zone") from error

    def dates(self, now: datetime) -> list[str]:
        """What is due at `now`, which has a time zone, in the order to be run."""
        if self.date is not None:
            return [self.date]
        here = now.astimezone(ZoneInfo(self.timezone)).replace(tzinfo=None)
        found = due_dates(here, self.every, since=self.since, lag=self.lag, max_dates=self.max_dates)
        # With `cancel` the newest counts: a date that was cancelled for it must not run before it.
        return found[::-1] if self.overlap == "cancel" else found


@dataclass(frozen=True, slots=True)
class Schedule:
    """The job of every date: `arguments` are its overrides, with `{date}` in them."""

    settings: ScheduleSettings
    arguments: tuple[str, ...]
    publish: PublishSettings

    def job(self, date: str) -> Settings:
        """The job of one date. Raises ConfigError."""
        config = compose([argument.replace(DATE, date) for argument in self.arguments], KNOWN_KEYS)
        if config is None:
            raise ConfigError("a schedule takes overrides only, and no --cfg or --info")
        settings = from_config(config)
        if settings.mode != "run":
            raise ConfigError(f"mode={settings.mode} needs no schedule: use python -m pipeline.run")
        return settings

    @property
    def folder(self) -> str:
        """The one that all dates lie in. Raises ConfigError when output.path has no date in it."""
        paths = [each.partition("=")[2] for each in self.arguments if each.startswith("output.path=")]
        path = paths[-1].strip("'\"") if paths else ""
        if DATE not in path:
            raise ConfigError(f"output.path={path or '???'}: it needs {DATE} in it, a folder for each date")
        return path.partition(DATE)[0].rpartition("/")[0] or "."


def run_schedule(
    schedule: Schedule, launch: Launch, *, now: datetime, lock: RunLock | None = None, poll_s: float = 2.0
) -> ExitCode:
    """Run what is due; the exit code of the first date that did not end well, or 0.

    `launch` runs a job. Raises TidemillError for what the user must see to before any date is run.
    """
    storage = open_storage(schedule.folder)
    dates = schedule.settings.dates(now)
    todo = [date for date in dates if not _is_over(schedule, date)]
    if not todo:
        print(f"Nothing is due: {', '.join(dates) or 'no date yet'} finished before.", flush=True)
        return ExitCode.DONE
    storage.check()
    with lock or RunLock(storage) as held:
        if not _take(held, schedule.settings, todo, poll_s):
            return ExitCode.DONE
        return _run_dates(schedule, launch, held, todo)


def _run_dates(schedule: Schedule, launch: Launch, lock: RunLock, todo: Sequence[str]) -> ExitCode:
    worst = ExitCode.DONE
    for date in todo:
        if _is_over(schedule, date):  # by whoever held the lock before
            continue
        print(f"{date}:", flush=True)
        try:
            code = _run_date(schedule, launch, lock, date)
        except TidemillError as error:  # of this date (its input is not there): others may do
            code = say(error)
        worst = worst or code
        if code is ExitCode.DRAINED:
            break
    return worst


def _run_date(schedule: Schedule, launch: Launch, lock: RunLock, date: str) -> ExitCode:
    settings = schedule.job(date)
    code = ExitCode.DONE
    if not _has_manifest(open_output(settings.output)):
        stop = StopRequest(settings.drain_seconds)
        with lock.running(date, stop):
            code = launch(settings, stop)
    if code is ExitCode.DONE and schedule.settings.publish:
        code = publish(open_output(settings.output), schedule.publish)
    return code


def _is_over(schedule: Schedule, date: str) -> bool:
    """Whether nothing is left to do for a date."""
    storage = open_output(schedule.job(date).output)
    if not _has_manifest(storage):
        return False
    return not schedule.settings.publish or published_as(storage, schedule.publish) is not None


def _has_manifest(storage: Storage) -> bool:
    return retrying(lambda: storage.size(MANIFEST)) is not None


def _take(lock: RunLock, settings: ScheduleSettings, todo: Sequence[str], poll_s: float) -> bool:
    """Take the lock as the overlap policy says. False: another start is at work, and this one ends."""
    seen: dict[int, str] = {}  # the first nonce of each holder
    asked: set[int] = set()
    while not lock.take():
        holder = lock.holder()
        if holder is not None:
            first = seen.setdefault(holder.epoch, holder.nonce)
            is_alive = holder.nonce != first
            is_same = holder.date == todo[0]
            if is_alive and (settings.overlap == "skip" or (settings.overlap == "cancel" and is_same)):
                what = holder.date or "a date"
                print(f"Skipped {', '.join(todo)}: {holder} is at work on {what}.", flush=True)
                return False
            if settings.overlap == "cancel" and holder.date and not is_same and holder.epoch not in asked:
                asked.add(holder.epoch)
                print(f"Asking {holder} to stop its work on {holder.date}.", flush=True)
                lock.ask_to_end(holder, f"{todo[0]} is due")
        time.sleep(poll_s)
    return True


def _launcher(settings: ScheduleSettings, cluster: RaySettings) -> Launch:
    if settings.launcher == "run":
        return lambda job, stop: run_job(job, stop=stop)
    from jobs.ray.driver import run_on_ray

    return lambda job, stop: run_on_ray(job, cluster, stop=stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is due; every expected error is one line and an exit code."""
    return exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> ExitCode:
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        print(section_help("schedule", ScheduleSettings))
        return ExitCode.DONE
    settings, rest = take_section(arguments, "schedule", ScheduleSettings)
    publishing, rest = take_section(rest, "publish", PublishSettings)
    cluster, rest = take_section(rest, "ray", RaySettings)
    schedule = Schedule(settings, tuple(rest), publishing)
    return run_schedule(schedule, _launcher(settings, cluster), now=datetime.now(ZoneInfo("UTC")))


if __name__ == "__main__":
    sys.exit(main())
