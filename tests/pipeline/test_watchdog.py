"""A step that hangs ends the process with 75 and keeps what is committed; slow starts fool nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.exit_codes import ExitCode
from pipeline.watchdog import StepWatchdog
from tests.pipeline.job_helpers import commits, final_bytes, job_settings, run_fake, write_shards

HANGING_JOB = """
import sys, time
from pathlib import Path
from pipeline.ledger import Ledger
from pipeline.run import run_job
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.job_helpers import fake_model, job_settings

def slow_to_make(loaded, settings):
    time.sleep(1.5)  # compiling
    return FakeEngine(max_num_seqs=4, crash_on={"0:20"}, crash_at_step=1, crash=lambda _: time.sleep(600))

settings = job_settings(Path(sys.argv[1]), sys.argv[2], step_timeout_s=1.0)
sys.exit(int(run_job(settings, load_model=fake_model, make_engine=slow_to_make, open_ledger=Ledger.open)))
"""


def test_a_hung_step_ends_the_job_with_75_and_keeps_what_is_committed(
    repository: Path, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1, rows_per_shard=30)
    assert run_fake(job_settings(shards, tmp_path / "undisturbed")) is ExitCode.DONE
    command = [sys.executable, "-c", HANGING_JOB, str(shards), str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == ExitCode.RETRY_LATER
    assert "a step of the engine has not come back for 1 s (step_timeout_s=1)" in ended.stderr
    assert "start the same command again" in ended.stderr
    assert "in step" in ended.stderr, "it says where it hangs"
    assert commits(tmp_path / "out")
    assert run_fake(job_settings(shards, tmp_path / "out")) is ExitCode.DONE
    assert final_bytes(tmp_path / "out") == final_bytes(tmp_path / "undisturbed")


def test_only_one_step_that_is_too_long_counts() -> None:
    hangs: list[float] = []
    with StepWatchdog(0.3, hangs.append) as watchdog:
        for _ in range(8):
            with watchdog.watched():
                time.sleep(0.1)
        time.sleep(0.6)  # nothing is watched
        assert hangs == []
        with watchdog.watched():
            time.sleep(0.6)
    assert len(hangs) == 1
    assert hangs[0] >= 0.3


def test_a_process_that_was_stopped_has_not_waited(repository: Path) -> None:
    code = """
import time
from pipeline.watchdog import StepWatchdog
with StepWatchdog(3.0) as watchdog, watchdog.watched():
    print("begun", flush=True)
    for _ in range(100):
        time.sleep(0.01)
print("over", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.7)  # the watchdog has seen the step
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4.0)
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "over\n", "")
