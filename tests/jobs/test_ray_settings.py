"""What `python -m jobs.ray` accepts, how workers are placed, and how a run ended; all without Ray."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError
from jobs.ray.__main__ import main
from jobs.ray.driver import errors, exit_code
from jobs.ray.settings import RaySettings
from jobs.ray.worker import WorkerEnd
from jobs.sections import take_section
from pipeline.exit_codes import ExitCode
from tests.pipeline.job_helpers import job_settings


def test_the_ray_section_is_taken_out_of_the_overrides_and_the_rest_is_the_job():
    settings, rest = take_section(
        ["input.path=a", "ray.num_workers=4", "ray.address=host:6379", "ray.resources={v4: 2}", "conf=cpu"],
        "ray",
        RaySettings,
    )
    assert settings == RaySettings(num_workers=4, address="host:6379", resources={"v4": 2.0})
    assert rest == ["input.path=a", "conf=cpu"]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("ray.num_worker=4", "did you mean 'ray.num_workers'"),
        ("ray.num_workers=0", "must be at least 1"),
        ("ray.num_workers=many", "expected an integer"),
        ("ray.max_restarts=-2", "must be -1"),
        ("ray.cpus_per_worker=-1", "must not be negative"),
        ("ray.cpus_per_worker=0", "nothing to place workers by"),
        ("ray.address=ray://host:10001", "client protocol is not supported"),
        ("ray.resources={a", "quote values with special characters"),
        ("ray.address", "is not an override"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(argument: str, says: str):
    with pytest.raises(ConfigError, match=re.escape(says)):
        take_section([argument], "ray", RaySettings)


@pytest.mark.parametrize(
    ("platform", "given", "wanted"),
    [
        ("cpu", {}, (1.0, 0.0, {})),
        ("auto", {}, (1.0, 0.0, {})),
        ("gpu", {}, (1.0, 1.0, {})),
        ("tpu", {}, (1.0, 0.0, {"TPU": 1.0})),
        ("tpu", {"tpus_per_worker": 4.0, "resources": {"pool": 1.0}}, (1.0, 0.0, {"TPU": 4.0, "pool": 1.0})),
        ("gpu", {"gpus_per_worker": 0.0, "cpus_per_worker": 8.0}, (8.0, 0.0, {})),
    ],
)
def test_a_worker_is_placed_by_what_its_platform_needs(platform: str, given: dict, wanted: tuple):
    settings = job_settings(Path("in"), "out", engine__platform=platform)
    num_cpus, num_gpus, resources = wanted
    assert RaySettings(**given).placement(settings) == {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "resources": resources,
    }


def test_without_ray_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([f"input.path={tmp_path}", f"output.path={tmp_path}/out"]) == ExitCode.BAD_CONFIG
    assert capsys.readouterr().err.strip() == (
        "tidemill: error: python -m jobs.ray needs the package 'ray': pip install 'tidemill[ray]'"
    )
    assert not (tmp_path / "out").exists()


def test_other_modes_are_not_for_many_workers(capsys: pytest.CaptureFixture[str]):
    assert main(["mode=plan", "input.path=a"]) == ExitCode.BAD_CONFIG
    assert "python -m pipeline.run" in capsys.readouterr().err


def test_help_lists_both_halves(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):  # Hydra answers, and ends the process
        main(["--help"])
    out = capsys.readouterr().out
    assert "max_reject_fraction" in out
    assert "ray.num_workers=1" in out


@pytest.mark.parametrize(
    ("codes", "is_stopped", "wanted"),
    [
        ("DONE DONE", False, "DONE"),
        ("RETRY_LATER DONE", False, "DONE"),
        ("BAD_CONFIG DONE", False, "DONE"),
        ("DONE", True, "DONE"),
        ("DONE TOO_MANY_REJECTS", False, "TOO_MANY_REJECTS"),
        ("BAD_CONFIG RETRY_LATER", False, "BAD_CONFIG"),
        ("DRAINED RETRY_LATER", True, "DRAINED"),
        ("DRAINED", False, "RETRY_LATER"),
        ("RETRY_LATER", False, "RETRY_LATER"),
    ],
)
def test_the_run_ends_as_the_worker_that_knows_best(codes: str, is_stopped: bool, wanted: str):
    ended = [WorkerEnd(ExitCode[code], "") for code in codes.split()]
    assert exit_code(ended, is_stopped) is ExitCode[wanted]


def test_an_error_that_all_workers_met_is_said_once():
    ended = [WorkerEnd(ExitCode.BAD_CONFIG, "no such folder")] * 3 + [WorkerEnd(ExitCode.DONE, "summary")]
    assert errors(ended) == ["no such folder"]
    held = WorkerEnd(ExitCode.RETRY_LATER, "held by another")
    assert errors([held]) == ["held by another"]
    assert errors([held, WorkerEnd(ExitCode.DONE, "summary")]) == [], "it is done all the same"
