"""The scaling benchmark: its engine has the speed it says, and its runs are whole."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from jobs.bench import scaling
from jobs.bench.paced_engine import PacedEngine
from pipeline.results import open_run


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    return parser.parse_args(arguments)


def fill(engine: PacedEngine, number: int, tokens: int) -> None:
    for i in range(number):
        engine.add_request(
            str(i), [1, 2], sampling=SamplingParams(max_tokens=tokens), identity="", expected_output_len=None
        )


@pytest.mark.parametrize("host_seconds", [0.0, 0.01])
def test_the_engine_takes_its_time_whatever_the_host_does_meanwhile(host_seconds: float):
    engine = PacedEngine(step_seconds=0.02, max_num_seqs=4)
    fill(engine, 8, tokens=5)
    started, done = time.monotonic(), []
    while engine.has_unfinished:
        done.extend(engine.step())
        time.sleep(host_seconds)
    seconds = time.monotonic() - started
    assert [output.request_id for output in done] == [str(i) for i in range(8)]
    assert engine.stats().num_steps == 10
    # The first step is under way when it is asked for.
    assert 9 * 0.02 <= seconds < 15 * 0.02


def test_a_host_that_is_slower_than_a_step_is_waited_for():
    engine = PacedEngine(step_seconds=0.01, max_num_seqs=4)
    fill(engine, 4, tokens=4)
    started = time.monotonic()
    while engine.has_unfinished:
        engine.step()
        time.sleep(0.03)
    assert time.monotonic() - started >= 4 * 0.03


def test_an_aborted_request_is_gone():
    engine = PacedEngine(step_seconds=0.0, max_num_seqs=4)
    fill(engine, 2, tokens=1)
    engine.abort_request("0")
    assert [output.request_id for output in engine.step()] == ["1"]


def test_one_and_two_workers_make_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = ["--workers", "1,2", "--shards", "4", "--chunk-seconds", "0.4", "--output", str(tmp_path / "out")]
    data = scaling.run(options(*given))
    alone, both = data["points"]
    assert alone["efficiency"] == 1.0
    assert both["efficiency"] == pytest.approx(alone["seconds"] / (2 * both["seconds"]))
    assert alone["engine_seconds"] == pytest.approx(4 * 2 * 0.4)
    # But for a first step that is under way already. How much longer it takes is what is measured.
    assert all(point["seconds"] > 0.9 * point["engine_seconds"] for point in (alone, both))
    runs = [open_run(path) for path in (tmp_path / "out").iterdir()]
    assert [run.counts()["rows"] for run in runs] == [4 * 2 * 16] * 2
    assert all(run.is_finished for run in runs)
    assert "2 workers:" in capsys.readouterr().out


def test_the_first_number_of_workers_is_one():
    with pytest.raises(ConfigError, match="must begin with 1"):
        scaling.run(options("--workers", "2,4"))
