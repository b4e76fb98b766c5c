"""Several processes of some devices each are as one process of all of them, and that as one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sharding.meshes import DRAWN, GREEDY, ONE_DEVICE, checkpoint, engine, tokens


def start(count: int, index: int, address: str, dims: tuple[int, ...], num_devices: int, repository: Path):
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    arguments = [checkpoint(tie_word_embeddings=False), address, str(count), str(index), json.dumps(dims)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sharding.process", *arguments],
        cwd=repository,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


@pytest.mark.parametrize(
    ("num_processes", "num_devices", "dims"),
    [(2, 2, (1, 1, 1, -1, 1)), (2, 1, (2, 1, 1, 1, 1)), (4, 1, (1, 2, 1, 2, 1))],
)
def test_tokens_are_those_of_one_device(num_processes, num_devices, dims, repository: Path):
    address = free_address()
    started = [
        start(num_processes, index, address, dims, num_devices, repository) for index in range(num_processes)
    ]
    ended = [process.communicate(timeout=400) for process in started]
    for process, (out, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, out + err[-4000:]
    single = engine(ONE_DEVICE)
    biased = GREEDY.replace(logit_bias={9: 2.0}, presence_penalty=0.5)
    wanted = [tokens(single, sampling) for sampling in (GREEDY, DRAWN, biased)]
    assert json.loads(ended[0][0].splitlines()[-1]) == json.loads(json.dumps(wanted))


def test_a_job_in_two_processes_writes_what_one_writes(tmp_path: Path, repository: Path):
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": f"r{index}", "prompt": f"the answer is {index}"}) + "\n" for index in range(9))
    )
    address = free_address()

    def job(output: str, *options: str):
        arguments = [
            f"model.source={checkpoint(tie_word_embeddings=False)}",
            f"input.path={tmp_path / 'in.jsonl'}",
            "input.id_column=id",
            f"output.path={tmp_path / output}",
            "sampling.temperature=0",
            "sampling.max_tokens=8",
            "prompt.chat=false",
            "progress=off",
            *(f"engine.{name}={value}" for name, value in OPTIONS.items()),
            *options,
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.run", *arguments],
            cwd=repository,
            env={**os.environ, "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    both = [
        job(
            "two",
            f"engine.coordinator_address={address}",
            "engine.num_processes=2",
            f"engine.process_id={index}",
        )
        for index in range(2)
    ]
    one = job("one")
    for process in (*both, one):
        out = process.communicate(timeout=400)[0]
        assert process.returncode == 0, out[-4000:]
    data = [next((tmp_path / name / "data").iterdir()).read_bytes() for name in ("one", "two")]
    assert data[0] == data[1]
