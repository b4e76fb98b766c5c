"""The ledger: whatever happens to whom and when, a resumed run ends in the bytes of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.errors import OutputError
from pipeline.lease import Lease
from pipeline.ledger import InputChanged, Ledger
from pipeline.local_storage import LocalStorage
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.small_run import (
    NO_SUSPECTS,
    Crash,
    FaultyStorage,
    fill,
    open_ledger,
    results,
    small_plan,
    undisturbed,
    work,
)

TINY = small_plan(num_shards=1, num_rows=5, chunk_rows=3, carried=(), with_token_ids=False)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch):
    """Power cuts are not simulated here, so nothing is lost by not syncing; and nobody waits between
    retries.
    """
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("pipeline.commits._FIRST_PAUSE_S", 0.0)


def spool_of(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def must_claim(ledger: Ledger, shard: int) -> Lease:
    lease = ledger.claim(shard)
    assert lease is not None
    return lease


def commit_one(ledger: Ledger, shard: int, chunk: int) -> bool:
    lease = must_claim(ledger, shard)
    files = fill(ledger, lease, chunk, FakeEngine(), NO_SUSPECTS)
    won = ledger.commit_chunk(lease, files, input_version=ledger.plan.shards[shard].version)
    lease.release()
    return won


@pytest.mark.parametrize("mode", ["crash before", "crash after", "lost", "unapplied"])
def test_a_fault_at_any_storage_operation_changes_no_byte(tmp_path: Path, mode: str):
    expected = undisturbed(tmp_path, TINY)
    counted = FaultyStorage(LocalStorage(tmp_path / "counted"))
    assert work(counted, spool_of(tmp_path), TINY) is not None
    assert len(counted.writes) >= 15
    # After one that only looks is before the next one.
    places = counted.writes if mode == "crash after" else range(counted.num_operations)
    for fail_at in places:
        output = tmp_path / f"out-{fail_at}"
        try:
            manifest = work(FaultyStorage(LocalStorage(output), fail_at, mode), spool_of(tmp_path), TINY)
            assert "crash" not in mode, f"operation {fail_at} did not happen"
        except Crash:
            manifest = work(LocalStorage(output), spool_of(tmp_path), TINY)
        assert manifest is not None, f"operation {fail_at}"
        assert manifest["totals"]["rows"] == 5
        assert results(output) == expected, f"operation {fail_at}"
        assert chunks_are_all_referred_to(output), f"operation {fail_at}"
    print(f"\ndisk, {mode}: all {len(places)} operations, one a run, all with the same bytes")


def chunks_are_all_referred_to(output: Path) -> bool:
    names = {str(path.relative_to(output)) for path in output.glob("_state/*/chunks/*/*")}
    records = [json.loads(path.read_text()) for path in output.glob("_state/*/commits/*/*.json")]
    return names == {
        record[kind]["path"] for record in records for kind in ("data", "trace", "rejects") if record[kind]
    }


def test_a_run_that_crashes_all_the_time_still_ends_in_the_same_bytes(tmp_path: Path):
    expected = undisturbed(tmp_path)
    output, manifest, num_crashes = tmp_path / "out", None, 0
    for stop_after in [7, 19, 31, 23, 40, 29, 55, 200]:
        try:
            manifest = work(FaultyStorage(LocalStorage(output), stop_after), spool_of(tmp_path))
        except Crash:
            num_crashes += 1
    assert num_crashes >= 5
    assert manifest is not None
    assert results(output) == expected


def test_committed_chunks_are_not_made_again(tmp_path: Path):
    with open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) as ledger:
        assert commit_one(ledger, 0, 1)
        before = ledger.committed(0)[1]
    with open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) as ledger:
        assert ledger.missing_chunks(0) == [0, 2]
        assert ledger.counts()["rows"] == 3
    assert work(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) is not None
    with open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) as ledger:
        assert ledger.committed(0)[1] == before
        assert ledger.unfinished() == []


def test_a_finished_run_is_left_as_it_is(tmp_path: Path):
    first = work(LocalStorage(tmp_path / "out"), spool_of(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert work(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) == first
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before
    assert not list(spool_of(tmp_path).glob("*")), "the spool is left empty"


def test_of_workers_racing_for_one_chunk_one_wins_and_the_rest_leave_nothing(tmp_path: Path):
    expected = undisturbed(tmp_path)
    ledgers = [open_ledger(LocalStorage(tmp_path / "out"), tmp_path / f"spool-{i}") for i in range(8)]
    leases = [
        must_claim(ledger, 0) for ledger in ledgers
    ]  # each takes over from a process that does not exist
    files = [
        [fill(ledger, lease, chunk, FakeEngine(), NO_SUSPECTS) for chunk in range(3)]
        for ledger, lease in zip(ledgers, leases, strict=True)
    ]
    start = threading.Barrier(len(ledgers))
    wins: list[tuple[int, bool]] = []

    def race(number: int) -> None:
        start.wait()
        for chunk in files[number]:
            won = ledgers[number].commit_chunk(leases[number], chunk, input_version={"size": 0})
            wins.append((chunk.chunk, won))
        ledgers[number].finalise_shard(0)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(len(ledgers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(chunk for chunk, won in wins if won) == [0, 1, 2]
    assert len(wins) == 24
    for ledger in ledgers:
        ledger.close()
        assert not list(ledger._spool_dir.glob("*"))
    assert work(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) is not None
    assert results(tmp_path / "out") == expected
    assert chunks_are_all_referred_to(tmp_path / "out")


CHILD = """
import sys
from pathlib import Path
from pipeline.local_storage import LocalStorage
from tests.pipeline.fake_engine import kill_process
from tests.pipeline.small_run import work
storage, spool = LocalStorage(Path(sys.argv[1])), Path(sys.argv[2])
manifest = work(storage, spool, crash_on=sys.argv[3:], crash=kill_process, owner=None)
sys.exit(0 if manifest else 1)
"""


def test_kill_9_is_resumed_at_once_and_a_row_that_kills_is_set_aside(tmp_path: Path, repository: Path):
    """Two deaths with the row among others, three with it alone; then the run ends without it."""
    command = [sys.executable, "-c", CHILD, str(tmp_path / "out"), str(spool_of(tmp_path)), "0-1"]
    codes = [subprocess.run(command, cwd=repository, timeout=60, check=False).returncode for _ in range(6)]
    assert codes == [-9] * 5 + [0]
    lines = (tmp_path / "out/rejects/part-00000-of-00002.jsonl").read_text().splitlines()
    rejects = [json.loads(line) for line in lines]
    assert [(line["position"], line["reason"]) for line in rejects] == [(1, "quarantined"), (4, "not_json")]


def test_deaths_from_outside_set_no_row_aside(tmp_path: Path):
    """Twenty deaths in one chunk, at ever other moments: the bytes stay those of an undisturbed run."""
    expected = undisturbed(tmp_path)
    for death in range(20):
        with pytest.raises(Crash):
            work(LocalStorage(tmp_path / "out"), spool_of(tmp_path), crash_on=[f"0-{1 + 2 * (death % 3)}"])
    assert work(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) is not None
    assert results(tmp_path / "out") == expected


def test_a_changed_input_ends_its_shard_and_is_never_mixed(tmp_path: Path):
    with open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) as ledger:
        commit_one(ledger, 1, 0)
        lease = must_claim(ledger, 1)
        files = fill(ledger, lease, 1, FakeEngine(), NO_SUSPECTS)
        with pytest.raises(InputChanged, match="/in-1 changed while it was being read"):
            ledger.commit_chunk(lease, files, input_version={"size": 1, "etag": "new"})
        assert ledger.missing_chunks(1) == [1, 2]
        assert not list(spool_of(tmp_path).glob("*"))
        assert ledger.finish() is None
    ended = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("_state/*/ended/00001/*")]
    assert [each["state"] for each in ended] == ["INPUT_CHANGED"]
    assert not list((tmp_path / "out").glob("data/*")), "nothing final was made"


def test_damage_is_found_and_told(tmp_path: Path):
    output = tmp_path / "out"
    with open_ledger(LocalStorage(output), spool_of(tmp_path)) as ledger:
        for chunk in range(3):
            commit_one(ledger, 0, chunk)
        chunk_file = output / ledger.committed(0)[1].data.path
        content = chunk_file.read_bytes()
        chunk_file.write_bytes(content[:-1] + b"?")
        with pytest.raises(OutputError, match=rf"{chunk_file.name} is damaged.*commits/00000/00001\.json"):
            ledger.finalise_shard(0)
        chunk_file.unlink()
        with pytest.raises(OutputError, match="is missing"):
            ledger.finalise_shard(0)
    (output / "_state" / ledger.fingerprint / "commits/00000/00001.json").unlink()  # as the message says
    assert work(LocalStorage(output), spool_of(tmp_path)) is not None
    assert results(output) == undisturbed(tmp_path)
    (commit,) = output.glob("_state/*/commits/00000/00000.json")
    commit.write_text("{")
    with (
        open_ledger(LocalStorage(output), spool_of(tmp_path)) as ledger,
        pytest.raises(OutputError, match=r"00000\.json is damaged"),
    ):
        ledger.committed(0)


def test_a_lost_final_file_is_made_again_and_a_changed_one_told(tmp_path: Path):
    output = tmp_path / "out"
    work(LocalStorage(output), spool_of(tmp_path))
    expected = results(output)
    final = output / "data/part-00000-of-00002.parquet"
    final.unlink()
    assert work(LocalStorage(output), spool_of(tmp_path)) is not None
    assert results(output) == expected
    final.write_bytes(b"something else")
    with pytest.raises(OutputError, match=r"part-00000-of-00002\.parquet has 14 bytes"):
        work(LocalStorage(output), spool_of(tmp_path))
