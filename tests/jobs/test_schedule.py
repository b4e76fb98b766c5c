"""A schedule runs each date once, catches up, and holds to its policy while another date runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.publish import PublishSettings
from jobs.run_lock import RunLock
from jobs.schedule import Schedule, ScheduleSettings, main, run_schedule
from jobs.sections import take_section
from pipeline.compose import compose
from pipeline.exit_codes import ExitCode
from pipeline.process_identity import ProcessIdentity
from pipeline.results import open_run
from pipeline.run import run_job
from pipeline.settings import Settings
from pipeline.signals import StopRequest
from pipeline.storage import open_storage
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.job_helpers import fake_engine, fake_model, final_bytes, write_shards

NOW = datetime(2026, 11, 28, 3, tzinfo=UTC)
ELSEWHERE = ProcessIdentity("elsewhere", "another boot", "1", 1, "1")


@pytest.fixture(autouse=True)
def compose_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra composes for one at a time; here threads stand for the processes that are started."""
    turn = threading.Lock()

    def composed(*arguments: Any) -> Any:
        with turn:
            return compose(*arguments)

    monkeypatch.setattr("jobs.schedule.compose", composed)


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


def schedule_of(tmp_path: Path, place: str, *more: str, dates: tuple[str, ...] = ()) -> Schedule:
    for date in dates:
        write_shards(tmp_path / "in" / date, num_shards=1, rows_per_shard=6)
    settings, rest = take_section(more, "schedule", ScheduleSettings)
    job = [
        f"input.path={tmp_path}/in/{{date}}",
        "input.id_column=id",
        f"output.path={place}/{{date}}",
        "output.chunk_rows=3",
        "sampling.max_tokens=6",
        "engine.max_num_seqs=4",
        "progress=off",
    ]
    return Schedule(settings, (*job, *rest), PublishSettings())


class Launches:
    """Runs jobs with the fake engine and remembers their dates. `before_step` is called before each step."""

    def __init__(self, before_step: Callable[[], None] = lambda: None):
        self.dates: list[str] = []
        self._before_step = before_step

    def __call__(self, settings: Settings, stop: StopRequest) -> ExitCode:
        assert settings.output.path is not None
        self.dates.append(settings.output.path.rpartition("/")[2])
        return run_job(settings, load_model=fake_model, make_engine=self._engine, stop=stop)

    def _engine(self, loaded: Any, settings: Settings) -> FakeEngine:
        engine = fake_engine(loaded, settings)
        step = engine.step
        engine.step = lambda: self._before_step() or step()
        return engine


def run(schedule: Schedule, launch: Launches, place: str, **options: Any) -> ExitCode:
    owner = options.pop("owner", None)
    lock = RunLock(open_storage(place), owner=owner, heartbeat_s=0.1, takeover_s=1.0, poll_s=0.05)
    return run_schedule(schedule, launch, now=NOW, lock=lock, poll_s=0.05, **options)


def test_missed_dates_are_caught_up_with_once(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]):
    dates = ("2026-11-26", "2026-11-27", "2026-11-28")
    schedule = schedule_of(tmp_path, place, "schedule.since=2026-11-26", dates=dates)
    launches = Launches()
    assert run(schedule, launches, place) is ExitCode.DONE
    assert launches.dates == list(dates)
    assert all(open_run(f"{place}/{date}").is_finished for date in dates)
    before = final_bytes(f"{place}/2026-11-27")
    assert run(schedule, launches, place) is ExitCode.DONE
    assert launches.dates == list(dates), "a finished date was started again"
    assert "Nothing is due" in capsys.readouterr().out
    assert final_bytes(f"{place}/2026-11-27") == before


def test_a_date_whose_input_is_not_there_does_not_hold_up_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = str(tmp_path / "out")
    schedule = schedule_of(tmp_path, place, "schedule.since=2026-11-27", dates=("2026-11-28",))
    launches = Launches()
    assert run(schedule, launches, place) is ExitCode.BAD_CONFIG
    assert open_run(f"{place}/2026-11-28").is_finished
    assert "tidemill: error:" in capsys.readouterr().err
    write_shards(tmp_path / "in" / "2026-11-27", num_shards=1, rows_per_shard=6)
    assert run(schedule, launches, place) is ExitCode.DONE
    assert launches.dates == ["2026-11-27", "2026-11-28", "2026-11-27"]


@pytest.mark.parametrize("overlap", ["skip", "queue", "cancel"])
def test_the_same_date_started_twice_at_once_is_one_run(tmp_path: Path, place: str, overlap: str):
    schedule = schedule_of(tmp_path, place, f"schedule.overlap={overlap}", dates=("2026-11-28",))
    launches = Launches(lambda: time.sleep(0.1))
    codes: list[ExitCode] = []
    threads = [
        threading.Thread(target=lambda: codes.append(run(schedule, launches, place))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [ExitCode.DONE] * 3
    assert launches.dates == ["2026-11-28"]
    assert open_run(f"{place}/2026-11-28").is_finished
    assert open_storage(place).list("_schedule/cancel") == []


class Overlap:
    """Yesterday's run, held up at its third step until it is let go or asked to stop; then today's start."""

    def __init__(self, tmp_path: Path, place: str, overlap: str):
        dates = ("2026-11-27", "2026-11-28")
        self.place = place
        self.old = schedule_of(tmp_path, place, "schedule.date=2026-11-27", "drain_seconds=0", dates=dates)
        self.new = schedule_of(tmp_path, place, f"schedule.overlap={overlap}", dates=())
        self.is_held_up, self.may_go, self.num_steps = threading.Event(), threading.Event(), 0
        self.old_launches, self.new_launches = Launches(self._hold_up), Launches()
        self.codes: list[ExitCode] = []
        self.thread = threading.Thread(
            target=lambda: self.codes.append(run(self.old, self.old_launches, place))
        )
        self.thread.start()
        assert self.is_held_up.wait(60)

    def _hold_up(self) -> None:
        self.num_steps += 1
        if self.num_steps == 3:
            self.is_held_up.set()
            deadline = time.monotonic() + 30
            while not self.may_go.is_set() and time.monotonic() < deadline:
                if open_storage(self.place).list("_schedule/cancel"):
                    time.sleep(0.3)  # for the holder to see it too
                    return
                time.sleep(0.02)

    def end(self) -> None:
        self.may_go.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


def test_skip_leaves_the_date_to_the_next_start(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
):
    overlap = Overlap(tmp_path, place, "skip")
    assert run(overlap.new, overlap.new_launches, place) is ExitCode.DONE
    assert overlap.new_launches.dates == []
    assert re.search(
        r"Skipped 2026-11-28: process \d+ on \S+ is at work on 2026-11-27", capsys.readouterr().out
    )
    overlap.end()
    assert overlap.codes == [ExitCode.DONE]
    assert run(overlap.new, overlap.new_launches, place) is ExitCode.DONE
    assert overlap.new_launches.dates == ["2026-11-28"]


def test_queue_waits(tmp_path: Path, place: str):
    overlap = Overlap(tmp_path, place, "queue")
    threading.Timer(1.0, overlap.may_go.set).start()
    assert run(overlap.new, overlap.new_launches, place) is ExitCode.DONE
    assert open_run(f"{place}/2026-11-27").is_finished, "the dates ran at the same time"
    assert overlap.new_launches.dates == ["2026-11-28"]
    overlap.end()
    assert overlap.codes == [ExitCode.DONE]


def test_cancel_drains_the_other_date_which_is_caught_up_with(tmp_path: Path, place: str):
    overlap = Overlap(tmp_path, place, "cancel")
    assert run(overlap.new, overlap.new_launches, place) is ExitCode.DONE
    assert overlap.new_launches.dates == ["2026-11-28"]
    overlap.end()
    assert overlap.codes == [ExitCode.DRAINED]
    assert not open_run(f"{place}/2026-11-27").is_finished
    again = schedule_of(tmp_path, place, "schedule.overlap=cancel", "schedule.since=2026-11-27")
    launches = Launches()
    assert run(again, launches, place) is ExitCode.DONE
    assert launches.dates == ["2026-11-27"]
    assert open_run(f"{place}/2026-11-27").is_finished


@pytest.mark.parametrize("overlap", ["skip", "queue", "cancel"])
def test_a_holder_that_died_on_another_machine_is_followed(tmp_path: Path, place: str, overlap: str):
    schedule = schedule_of(tmp_path, place, f"schedule.overlap={overlap}", dates=("2026-11-28",))
    dead = RunLock(open_storage(place), owner=ELSEWHERE, heartbeat_s=1000.0)
    assert dead.take()
    started = time.monotonic()
    launches = Launches()
    assert run(schedule, launches, place) is ExitCode.DONE
    assert launches.dates == ["2026-11-28"]
    assert time.monotonic() - started >= 1.0, "it was not watched for as long as a lease lasts"


def test_a_holder_that_was_killed_here_is_followed_at_once(tmp_path: Path, repository: Path):
    place = str(tmp_path / "out")
    schedule = schedule_of(tmp_path, place, dates=("2026-11-28",))
    program = (
        "import sys, time; from jobs.run_lock import RunLock; from pipeline.storage import open_storage\n"
        "assert RunLock(open_storage(sys.argv[1])).take(); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, place], cwd=repository, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    launches = Launches()
    assert run(schedule, launches, place) is ExitCode.DONE
    assert launches.dates == ["2026-11-28"]


def test_a_holder_that_lost_the_lock_ends_its_run(tmp_path: Path):
    """It was stopped for longer than a lease; what it goes on with must not run beside the new holder's."""
    place = str(tmp_path / "out")
    old = RunLock(open_storage(place), owner=ELSEWHERE, heartbeat_s=0.5, poll_s=0.02)
    assert old.take()
    stop = StopRequest(1.0)
    with old.running("2026-11-27", stop):
        open_storage(place).create("_schedule/claims/00000/000002.json", b"{}")
        deadline = time.monotonic() + 10
        while not stop.is_asked and time.monotonic() < deadline:
            time.sleep(0.02)
    assert stop.cause is not None
    assert "took this one for dead" in stop.cause


def test_finished_runs_go_through_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = str(tmp_path / "out")
    dates = ("2026-11-27", "2026-11-28")
    schedule = schedule_of(tmp_path, place, "schedule.since=2026-11-27", "schedule.publish=true", dates=dates)
    launches = Launches()
    assert run(schedule, launches, place) is ExitCode.DONE
    assert open_storage(place).list("_published") == ["000001.json", "000002.json"]
    capsys.readouterr()
    assert run(schedule, launches, place) is ExitCode.DONE
    assert "Nothing is due" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("schedule.every=year", "hour"),
        ("schedule.date=yesterday", "write it as 2026-11-28"),
        ("schedule.since=2026-13-01", "write it as 2026-11-28"),
        ("schedule.max_dates=0", "at least 1"),
        ("schedule.lag=-1", "not be negative"),
        ("schedule.timezone=Mars/Olympus", "no such time zone"),
        ("schedule.overlap=allow", "skip"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(argument: str, says: str, capsys: pytest.CaptureFixture[str]):
    code = main([argument, "input.path=a", "output.path=b/{date}"])
    assert code == ExitCode.BAD_CONFIG
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("path", ["answers", "???"])
def test_an_output_without_a_date_is_refused(path: str, capsys: pytest.CaptureFixture[str]):
    assert main(["input.path=a", f"output.path={path}"]) == ExitCode.BAD_CONFIG
    assert "{date}" in capsys.readouterr().err


def test_dates_begin_in_their_time_zone():
    settings = ScheduleSettings(timezone="Pacific/Auckland")
    assert settings.dates(datetime(2026, 11, 28, 12, tzinfo=UTC)) == ["2026-11-29"]
    assert ScheduleSettings().dates(datetime(2026, 11, 28, 12, tzinfo=UTC)) == ["2026-11-28"]
