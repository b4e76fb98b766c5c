"""The job on a Ray cluster of two nodes here: whatever is killed, the bytes are those of one process.

The first test is quick; the others need TIDEMILL_CHAOS=1. All need the extra `ray`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from pipeline.claims import read_claim, read_claims
from pipeline.exit_codes import ExitCode
from pipeline.results import open_run
from pipeline.storage import open_storage
from pipeline.verify import Verifier
from tests.pipeline.job_helpers import commits, final_bytes, job_settings, run_fake, write_shards

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'tidemill[ray]'"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
chaos = pytest.mark.skipif(not os.environ.get("TIDEMILL_CHAOS"), reason="takes minutes: TIDEMILL_CHAOS=1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("input"), num_shards=6, rows_per_shard=24)


@pytest.fixture(scope="module")
def wanted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of them."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_fake(job_settings(shards, output)) is ExitCode.DONE
    return final_bytes(output)


# One for all clusters: Ray reads it once a process.
TOKEN = secrets.token_hex(32)


@pytest.fixture
def cluster(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without room for workers, and two nodes with room for one each, behind a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(repository))  # for Ray's workers
    Cluster = import_module("ray.cluster_utils").Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


class Driver:
    """A driver's process."""

    def __init__(
        self, shards: Path, output: Path, address: str, repository: Path, *more: str, **environment: str
    ):
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.jobs.ray_job", str(shards), str(output), address, "2", *more],
            cwd=repository,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> str:
        try:
            said, _ = self.process.communicate(timeout=240)
        finally:
            self.process.kill()
        return said

    def wait_for_commits(self, number: int) -> None:
        wait_until(lambda: self.process.poll() is not None or len(commits(self.output)) >= number)
        assert self.process.poll() is None, self.end()

    def worker_pids(self) -> set[int]:
        """Of the workers that live and hold a shard now."""
        storage = open_storage(str(self.output))
        (fingerprint,) = storage.list("_state")
        state, pids = f"_state/{fingerprint}", set()
        for name in storage.list(f"{state}/claims"):
            for key in read_claims(storage, state, int(name)).open_keys:
                owner = read_claim(storage, state, int(name), key).owner
                pids |= set() if owner.is_gone() else {owner.pid}
        return pids


@pytest.fixture
def start(shards: Path, cluster: Any, repository: Path, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def start(*more: str, **environment: str) -> Driver:
        output = tmp_path / "out"
        drivers.append(Driver(shards, output, cluster.address, repository, *more, **environment))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()
        assert driver.process.stdout is not None
        driver.process.stdout.close()


def wait_until(has_come: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not has_come():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def check(output: Path, wanted: dict[str, bytes], spool: Path) -> None:
    """Complete and exact."""
    assert final_bytes(output) == wanted
    assert Verifier(open_storage(str(output)), spool).run().findings == []
    assert open_run(output).counts()["rows"] == 6 * 24


def num_workers(output: Path) -> int:
    """Processes whose chunks count."""
    return len({each["attempt"] for metrics in open_run(output).metrics() for each in metrics["attempts"]})


def test_two_nodes_share_a_run(start: Callable[..., Driver], wanted: dict[str, bytes], tmp_path: Path):
    driver = start()
    said = driver.end()
    assert driver.process.returncode == ExitCode.DONE, said
    assert "Done: 144 rows in 6 shards." in said
    assert "of 144 rows (" in said, "no progress was shown"
    assert num_workers(driver.output) == 2
    check(driver.output, wanted, tmp_path)


@chaos
def test_a_worker_that_is_killed_is_started_again(
    start: Callable[..., Driver], wanted: dict[str, bytes], tmp_path: Path
):
    driver = start()
    killed: set[int] = set()
    for number in (3, 12, 20):
        driver.wait_for_commits(number)
        wait_until(lambda: bool(driver.worker_pids()))
        victim = min(driver.worker_pids())
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    said = driver.end()
    assert driver.process.returncode == ExitCode.DONE, said
    assert num_workers(driver.output) > 2
    check(driver.output, wanted, tmp_path)
    assert len(killed) == 3
    print(f"{len(killed)} workers killed, {num_workers(driver.output)} processes made the output")


@chaos
def test_a_node_that_is_killed_is_done_without(
    start: Callable[..., Driver], cluster: Any, wanted: dict[str, bytes], tmp_path: Path
):
    """Its worker waits for room and the other goes on; a node that joins is used."""
    driver = start()
    driver.wait_for_commits(6)
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
    driver.wait_for_commits(12)
    cluster.add_node(num_cpus=1)
    said = driver.end()
    assert driver.process.returncode == ExitCode.DONE, said
    check(driver.output, wanted, tmp_path)


@chaos
def test_a_driver_that_is_killed_and_started_again_goes_on(
    start: Callable[..., Driver], wanted: dict[str, bytes], tmp_path: Path
):
    kept: dict[str, Any] = {}
    for number in (3, 10):
        driver = start()
        driver.wait_for_commits(number)
        pids = driver.worker_pids()
        driver.process.kill()
        driver.end()
        wait_until(lambda pids=pids: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        now = commits(driver.output)
        assert kept.items() <= now.items()
        kept = now
    driver = start()
    said = driver.end()
    assert driver.process.returncode == ExitCode.DONE, said
    assert kept.items() <= commits(driver.output).items()
    check(driver.output, wanted, tmp_path)


@chaos
def test_sigterm_drains_every_worker(start: Callable[..., Driver], wanted: dict[str, bytes], tmp_path: Path):
    driver = start()
    driver.wait_for_commits(3)
    driver.process.send_signal(signal.SIGTERM)
    said = driver.end()
    assert driver.process.returncode == ExitCode.DRAINED, said
    assert driver.worker_pids() == set(), "a lease was not given back"
    said = (again := start()).end()
    assert again.process.returncode == ExitCode.DONE, said
    check(driver.output, wanted, tmp_path)


@chaos
def test_another_configuration_is_refused_as_without_ray(start: Callable[..., Driver]):
    assert start().end()
    driver = start("output.chunk_rows=5")
    said = driver.end()
    assert driver.process.returncode == ExitCode.BAD_CONFIG, said
    assert said.count("belongs to another configuration") == 1


@chaos
def test_the_cluster_demands_its_token(start: Callable[..., Driver]):
    driver = start(RAY_AUTH_TOKEN=secrets.token_hex(32))
    said = driver.end()
    assert driver.process.returncode in (ExitCode.BAD_CONFIG, ExitCode.RETRY_LATER), said
    assert not driver.output.exists()


@chaos
def test_a_cluster_started_for_the_run_listens_on_the_loopback_alone(
    shards: Path, wanted: dict[str, bytes], tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    driver = Driver(shards, tmp_path / "out", "local", repository)
    driver.wait_for_commits(1)
    public = listening_elsewhere(driver.process.pid)
    said = driver.end()
    assert driver.process.returncode == ExitCode.DONE, said
    assert public == []
    check(driver.output, wanted, tmp_path)


def listening_elsewhere(root: int) -> list[str]:
    """Addresses other than the loopback on which a process or its descendants listen."""
    import psutil

    def is_loopback(text: str) -> bool:
        address = ip_address(text)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback

    family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    return [
        f"{process.name()} {each.laddr.ip}:{each.laddr.port}"
        for process in family
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN and not is_loopback(each.laddr.ip)
    ]
