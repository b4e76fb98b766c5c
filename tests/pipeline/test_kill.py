"""The real job, killed at random moments: the same command brings it to the same bytes, and to those of a run
in input order.

TIDEMILL_KILLS sets how many times it is killed (3), TIDEMILL_KILL_SEED at which moments (0). With
TIDEMILL_CHAOS=1 the same is done to a job whose output is in a bucket, and to runs of one to three workers,
there with a server that is killed too; each of these kills TIDEMILL_KILLS times and prints what it counted.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.results import open_run
from pipeline.storage import PassingFault, open_storage
from tests.pipeline.input_helpers import lines, write_jsonl, write_parquet
from tests.pipeline.job_helpers import commits, final_bytes
from tests.pipeline.store_servers import StoreServer

KILLS = int(os.environ.get("TIDEMILL_KILLS", "3"))
SEED = int(os.environ.get("TIDEMILL_KILL_SEED", "0"))
KILLS_A_RUN = 5


@pytest.fixture(scope="module")
def command(tiny_checkpoint: str, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A job of 3 shards and 15 chunks, small enough to be killed often: draws, bad rows, duplicates."""
    folder = tmp_path_factory.mktemp("input")
    for shard in range(2):
        rows = [{"id": f"{shard}-{i}", "prompt": f"{shard} said {i} and then", "own": None} for i in range(9)]
        write_jsonl(folder / f"{shard}.jsonl.gz", lines(rows) + b"not json\n")
    greedy = [
        {"id": f"2-{i}", "prompt": f"in the end {i % 4}", "own": '{"temperature": 0}'} for i in range(10)
    ]
    write_parquet(folder / "2.parquet", greedy)
    return [
        *(sys.executable, "-m", "pipeline.run"),
        f"model.source={tiny_checkpoint}",
        f"input.path={folder}",
        "input.id_column=id",
        "prompt.sampling_column=own",
        "output.chunk_rows=2",
        "sampling.max_tokens=40",
        "sampling.temperature=1.0",
        "sampling.ignore_eos=true",
        "engine.max_num_seqs=4",
        "engine.max_num_batched_tokens=16",
        "engine.page_size=16",
        "engine.max_model_len=96",
        "engine.kv_cache_bytes=1000000",
        f"engine.compilation_cache_dir={repository}/.cache/jax",
        "progress=off",
    ]


def start(command: list[str], output: str, repository: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, f"output.path={output}"],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "killed")
    if not os.environ.get("TIDEMILL_CHAOS"):
        pytest.skip("takes minutes: TIDEMILL_CHAOS=1")
    return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


def test_a_job_killed_at_random_moments_resumes_to_the_same_bytes(
    command: list[str], output: str, repository: Path, tmp_path: Path
) -> None:
    started = time.monotonic()
    undisturbed = start([*command, "input.order=input"], str(tmp_path / "undisturbed"), repository)
    _, errors = undisturbed.communicate(timeout=300)
    seconds = time.monotonic() - started
    assert undisturbed.returncode == 0, errors
    wanted = final_bytes(tmp_path / "undisturbed")
    assert len(wanted) == 3 + 2

    chance, kept = random.Random(SEED), {}
    for number in range(KILLS):
        process = start(command, output, repository)
        # The first at any moment, the start included; the others while there is work to lose.
        if number == 0:
            wait_for(process, after(chance.uniform(0, seconds)))
        else:
            wait_for(process, num_commits(output, len(kept) + chance.randint(1, 3)))
            wait_for(process, after(chance.uniform(0, 0.2)))
        process.kill()
        process.communicate(timeout=30)
        now = commits(output)
        assert kept.items() <= now.items(), "a committed chunk was changed or lost"
        kept = now

    process = start(command, output, repository)
    wait_for(process, num_commits(output, len(kept) + 1))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if open_storage(output).size("manifest.json") else 143), errors

    process = start(command, output, repository)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert kept.items() <= commits(output).items()
    assert final_bytes(output) == wanted
    counts = [open_run(folder).counts() for folder in (output, tmp_path / "undisturbed")]
    assert counts[0] == counts[1]
    assert counts[0]["duplicates"] == 10 - 4


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_killed_at_random_moments_end_with_the_same_bytes(
    workers: int,
    command: list[str],
    output: str,
    repository: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Runs that share their output: a worker that is killed is started again while the others go on."""
    if not os.environ.get("TIDEMILL_CHAOS"):
        pytest.skip("takes minutes: TIDEMILL_CHAOS=1")
    server = request.getfixturevalue("s3_server") if output.startswith("s3:") else None
    undisturbed = start(command, str(tmp_path / "undisturbed"), repository)
    _, errors = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, errors
    wanted = final_bytes(tmp_path / "undisturbed")

    chance = random.Random(f"{SEED} {workers} {server is None}")
    num_runs, num_kills, num_server_kills = 0, 0, 0
    while num_kills < KILLS:
        place, num_runs = f"{output}-{num_runs}", num_runs + 1
        with several(workers, command, place, repository) as processes:
            for _ in range(min(KILLS_A_RUN, KILLS - num_kills)):
                victim = chance.randrange(workers)
                goal = len(seen(place)) + chance.randint(0, 2)
                wait_for(processes[victim], num_commits(place, goal))
                wait_for(processes[victim], after(chance.uniform(0, 0.5)))
                num_kills += processes[victim].poll() is None
                processes[victim].kill()
                processes[victim].communicate(timeout=30)
                processes[victim] = start(command, place, repository)
                if server is not None and chance.random() < 0.3:
                    restart(server, chance.uniform(0, 1.0))
                    num_server_kills += 1
            for process in processes:
                process.communicate(timeout=600)
        last = start(command, place, repository)  # some may have given up on a server that was away
        _, errors = last.communicate(timeout=600)
        assert last.returncode == 0, errors
        assert final_bytes(place) == wanted
    print(
        f"{output.partition('/')[0] or 'disk'}, {workers} workers: {num_kills} kills of workers and "
        f"{num_server_kills} of the server in {num_runs} runs, all with the bytes of the undisturbed one"
    )


@contextmanager
def several(
    number: int, command: list[str], output: str, repository: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Workers of one run; whatever is left of them is ended."""
    processes = [start(command, output, repository) for _ in range(number)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def restart(server: StoreServer, seconds_away: float) -> None:
    server.kill()
    time.sleep(seconds_away)
    server.start()


def seen(output: str) -> dict[str, dict[str, Any]]:
    """The commits; waits for a server that was started again and does not have all its parts yet."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return commits(output)
        except PassingFault:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def wait_for(process: subprocess.Popen[str], has_come: Callable[[], bool]) -> None:
    """Until the moment has come or the process has ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and not has_come() and time.monotonic() < deadline:
        time.sleep(0.01)


def after(seconds: float) -> Callable[[], bool]:
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() >= moment


def num_commits(output: str, number: int) -> Callable[[], bool]:
    return lambda: len(seen(output)) >= number
