"""A signal asks for a drain, even of a main thread deep in C; a second Ctrl-C ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.exit_codes import ExitCode
from pipeline.signals import HandleSignals, StopRequest

# The main thread sits in one long call without a bytecode in between, as in a compilation.
STUCK = """
import sys, threading
from pipeline.signals import HandleSignals, StopRequest
import pipeline.signals
pipeline.signals.GRACE_SECONDS = 0.3
with HandleSignals(StopRequest(float(sys.argv[1]))) as stop:
    if sys.argv[3] == "works":
        stop.begin_work()
    print("ready", flush=True)
    while not (stop.is_asked and sys.argv[2] == "obeys"):
        sum(range(10**7))
print("drained", stop.cause, flush=True)
sys.exit(143)
"""


def start(repository: Path, drain_seconds: float, manner: str, work: str = "works") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(drain_seconds), manner, work],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_sigterm_asks_for_a_drain(repository: Path) -> None:
    process = start(repository, 10, "obeys")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (143, "drained SIGTERM\n", "")


def test_a_second_interrupt_ends_the_process_at_once(repository: Path) -> None:
    process = start(repository, 60, "hangs")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == ExitCode.STOPPED_AT_ONCE
    assert "the same command resumes" in err


@pytest.mark.parametrize(("drain_seconds", "work"), [(0.2, "works"), (60.0, "loads")])
def test_what_outlasts_its_drain_is_ended(repository: Path, drain_seconds: float, work: str) -> None:
    process = start(repository, drain_seconds, "hangs", work)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == ExitCode.DRAINED
    assert "the same command resumes" in err


def test_the_first_cause_and_deadline_stand() -> None:
    now = 100.0
    stop = StopRequest(10.0, clock=lambda: now)
    stop.begin_work()
    assert (stop.is_asked, stop.seconds_left) == (False, float("inf"))
    stop.ask("SIGTERM")
    now = 104.0
    stop.ask("SIGINT")
    assert (stop.is_asked, stop.cause, stop.seconds_left) == (True, "SIGTERM", 6.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with HandleSignals(StopRequest(60.0)) as stop:
        stop.begin_work()
        assert signal.getsignal(number) is not before
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not stop.is_asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.cause == number.name
    assert signal.getsignal(number) is before
