"""Whole runs whose output is in a bucket: the bytes of a run on a disk, whatever happens and however many
work.

TIDEMILL_CHAOS=1 tries every storage operation instead of a few.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections import Counter
from pathlib import Path

import pytest

from pipeline.exit_codes import ExitCode
from pipeline.process_identity import ProcessIdentity
from pipeline.results import open_run
from pipeline.storage import open_storage
from pipeline.verify import Verifier
from tests.pipeline.job_helpers import final_bytes, job_settings, run_fake, write_shards
from tests.pipeline.small_run import Crash, FaultyStorage, small_plan, stored_results, undisturbed, work
from tests.pipeline.store_proxy import EVERY_FAULT, Fault, StoreProxy

IS_CHAOS = bool(os.environ.get("TIDEMILL_CHAOS"))
TINY = small_plan(num_shards=1, num_rows=5, chunk_rows=3, carried=(), with_token_ids=False)


@pytest.fixture
def output(s3_bucket: str) -> str:
    return f"{s3_bucket}/{uuid.uuid4().hex}/out"


@pytest.mark.parametrize("mode", ["crash before", "crash after", "lost", "unapplied"])
def test_a_fault_at_any_storage_operation_changes_no_byte(
    output: str, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.commits._FIRST_PAUSE_S", 0.0)
    expected, spool = undisturbed(tmp_path, TINY), tmp_path / "spool"
    storage = open_storage(output)
    storage.check()
    counted = FaultyStorage(storage.subfolder("counted"))
    assert work(counted, spool, TINY) is not None
    assert stored_results(counted.inner) == expected
    places = counted.writes if mode == "crash after" else range(counted.num_operations)
    tried = places[:: 1 if IS_CHAOS else len(places) // 2]
    for fail_at in tried:
        inner = storage.subfolder(f"out-{fail_at}")
        try:
            manifest = work(FaultyStorage(inner, fail_at, mode), spool, TINY)
            assert "crash" not in mode, f"operation {fail_at} did not happen"
        except Crash:
            manifest = work(inner, spool, TINY)
        assert manifest is not None, f"operation {fail_at}"
        assert stored_results(inner) == expected, f"operation {fail_at}"
    print(f"\nS3, {mode}: {len(tried)} of {len(places)} operations, one a run, all with the same bytes")


@pytest.mark.parametrize(
    ("num_workers", "is_polite"),
    [(n, is_polite) for n in (1, 2, 3) for is_polite in (True, False)]
    if IS_CHAOS
    else [(2, True), (3, False)],
)
def test_any_number_of_workers_make_the_same_bytes(
    output: str, tmp_path: Path, num_workers: int, is_polite: bool, monkeypatch: pytest.MonkeyPatch
):
    """With leases kept nothing is made twice. With leases broken (each takes the others for dead) every chunk
    is fought over, and commit records decide.
    """
    monkeypatch.setattr("pipeline.sharing.HELD_POLL_SECONDS", 0.1)
    shards = write_shards(tmp_path / "in")
    assert run_fake(job_settings(shards, tmp_path / "disk")) is ExitCode.DONE
    owner = ProcessIdentity.of_this_process() if is_polite else None
    codes: list[ExitCode] = []
    threads = [
        threading.Thread(target=lambda: codes.append(run_fake(job_settings(shards, output), owner=owner)))
        for _ in range(num_workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) <= {ExitCode.DONE, ExitCode.RETRY_LATER}
    assert ExitCode.DONE in codes
    assert final_bytes(output) == final_bytes(tmp_path / "disk")
    run = open_run(output)
    assert run.is_finished
    assert run.counts()["rows"] == 24
    assert run.to_arrow("rows").equals(open_run(tmp_path / "disk").to_arrow("rows"))
    assert chunk_files(output) == referred_files(output)
    assert sum(each["store_requests"]["put"] for each in run.metrics()) > 9
    if is_polite:
        made = Counter(row["attempt"] for row in run.trace())
        assert len({attempt.partition("-")[2] for attempt in made}) == 3, "a lease a shard, and no other"


@pytest.mark.parametrize(
    ("share", "faults"),
    [(0.1, EVERY_FAULT)]
    + ([(share, (fault,)) for share in (0.01, 0.1) for fault in EVERY_FAULT] if IS_CHAOS else []),
)
def test_a_run_behind_faults_makes_the_same_bytes(
    proxy: StoreProxy, output: str, tmp_path: Path, share: float, faults: tuple[Fault, ...], monkeypatch
):
    """Two workers at once, on a store that fails in every way; the pipeline tries again, not botocore."""
    monkeypatch.setattr("pipeline.s3_client._TRIES_A_REQUEST", 1)
    monkeypatch.setattr("pipeline.sharing.HELD_POLL_SECONDS", 0.1)
    shards = write_shards(tmp_path / "in")
    assert run_fake(job_settings(shards, tmp_path / "disk")) is ExitCode.DONE
    proxy.sometimes(share, *faults)
    owner = ProcessIdentity.of_this_process()
    codes: list[ExitCode] = []
    threads = [
        threading.Thread(target=lambda: codes.append(run_fake(job_settings(shards, output), owner=owner)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [ExitCode.DONE] * 2
    assert proxy.num_faults > share * 100
    kinds = "every kind" if faults == EVERY_FAULT else f"{faults}"
    print(f"\nS3, {share:.0%} of requests, {kinds}: {proxy.num_faults} faults in one run")
    proxy.decide = lambda asked: None
    assert final_bytes(output) == final_bytes(tmp_path / "disk")
    assert chunk_files(output) == referred_files(output)
    assert Verifier(open_storage(output), tmp_path).run().findings == []


def chunk_files(output: str) -> set[str]:
    storage = open_storage(output)
    (state,) = storage.list("_state")
    chunks = f"_state/{state}/chunks"
    return {
        f"{chunks}/{shard}/{name}"
        for shard in storage.list(chunks)
        for name in storage.list(f"{chunks}/{shard}")
    }


def referred_files(output: str) -> set[str]:
    storage = open_storage(output)
    (state,) = storage.list("_state")
    commits = f"_state/{state}/commits"
    records = [
        json.loads(storage.read(f"{commits}/{shard}/{name}") or b"")
        for shard in storage.list(commits)
        for name in storage.list(f"{commits}/{shard}")
    ]
    return {
        record[kind]["path"]
        for record in records
        for kind in ("data", "trace", "rejects")
        if record[kind] is not None
    }


def test_a_run_on_gcs_makes_the_same_bytes(gcs_bucket: str, tmp_path: Path):
    shards, output = write_shards(tmp_path / "in", num_shards=2), f"{gcs_bucket}/{uuid.uuid4().hex}"
    assert run_fake(job_settings(shards, tmp_path / "disk")) is ExitCode.DONE
    # The emulator's uploads in parts are not conditional; these files are small.
    settings = job_settings(shards, output, output__unsafe_single_writer=True)
    assert run_fake(settings) is ExitCode.DONE
    assert run_fake(settings) is ExitCode.DONE, "a finished run is left as it is"
    assert final_bytes(output) == final_bytes(tmp_path / "disk")
    assert open_run(output).counts() == open_run(tmp_path / "disk").counts()
