"""Several processes of some devices each are as one process of all of them, and that as one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sharding.meshes import ONE_DEVICE, OPTIONS, UNTIED, checkpoint, engine, tokens
from tests.sharding.process import REQUESTS


def start(module: str, arguments: list[str], num_devices: int, repository: Path) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=repository,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(processes: list[subprocess.Popen[str]]) -> None:
    """Until all have ended well; what one left says why it did not."""
    try:
        for process in processes:
            out = process.communicate(timeout=400)[0]
            assert process.returncode == 0, out[-4000:]
    finally:
        for process in processes:
            process.kill()


def free_address() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


@pytest.mark.parametrize(
    ("num_processes", "num_devices", "dims"),
    [(2, 2, (1, 1, 1, -1, 1)), pytest.param(4, 1, (2, 1, 1, 2, 1), marks=pytest.mark.slow)],
)
def test_tokens_are_those_of_one_device(num_processes, num_devices, dims, repository: Path, tmp_path: Path):
    first = [checkpoint(**UNTIED), free_address(), str(num_processes)]
    found = tmp_path / "tokens.json"
    wait_for(
        [
            start(
                "tests.sharding.process",
                [*first, str(index), json.dumps(dims), str(found)],
                num_devices,
                repository,
            )
            for index in range(num_processes)
        ]
    )
    wanted = [tokens(engine(ONE_DEVICE), sampling) for sampling in REQUESTS]
    assert json.loads(found.read_text()) == json.loads(json.dumps(wanted))


def test_a_job_in_two_processes_writes_what_one_writes(tmp_path: Path, repository: Path):
    rows = [json.dumps({"id": f"r{index}", "prompt": f"the answer is {index}"}) for index in range(9)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    common = [
        f"model.source={checkpoint(**UNTIED)}",
        f"input.path={tmp_path / 'in.jsonl'}",
        "input.id_column=id",
        "sampling.temperature=0",
        "sampling.max_tokens=8",
        "progress=off",
        *(f"engine.{name}={value}" for name, value in OPTIONS.items()),
    ]
    address = f"engine.coordinator_address={free_address()}"
    together = [
        [address, "engine.num_processes=2", f"engine.process_id={index}", f"output.path={tmp_path / 'two'}"]
        for index in range(2)
    ]
    jobs = [*together, [f"output.path={tmp_path / 'one'}"]]
    wait_for([start("pipeline.run", [*common, *own], 1, repository) for own in jobs])
    data = [next((tmp_path / name / "data").iterdir()).read_bytes() for name in ("one", "two")]
    assert data[0] == data[1]
