"""`mode=verify` finds damage, `mode=repair` mends it to the same bytes, `mode=gc` takes garbage alone."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import OutputError, RetryLater
from pipeline.audit_mode import gc_job, repair_output, verify_job
from pipeline.exit_codes import ExitCode
from pipeline.garbage import find_garbage
from pipeline.process_identity import ProcessIdentity
from pipeline.repair import repair
from pipeline.run import main
from pipeline.run_state import read_job
from pipeline.settings import GcSettings
from pipeline.storage import Outcome, Storage, open_storage
from pipeline.verify import Verified, Verifier
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.job_helpers import final_bytes, job_settings, run_fake, write_shards
from tests.pipeline.small_run import NO_SUSPECTS, fill, open_ledger, small_plan, work

Damage = Callable[[Storage, str], None]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "in", num_shards=2)


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a finished job of two shards, three chunks each; a bad row in each shard."""
    if request.param == "disk":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


def run(shards: Path, output: str) -> None:
    assert run_fake(job_settings(shards, output, max_reject_fraction=0.5)) is ExitCode.DONE


def verify(output: str, spool: Path) -> Verified:
    spool.mkdir(exist_ok=True)
    verified = Verifier(open_storage(output), spool).run()
    assert not list(spool.iterdir()), "what was fetched is gone again"
    return verified


def state_of(storage: Storage) -> str:
    job = read_job(storage)
    assert job is not None
    return f"_state/{job['fingerprint']}"


def replace(storage: Storage, path: str, data: bytes) -> None:
    """What no worker ever does."""
    storage.discard(path)
    assert storage.create(path, data) is Outcome.WON


def flip_last_byte(storage: Storage, path: str) -> None:
    data = storage.read(path)
    assert data is not None
    replace(storage, path, data[:-1] + bytes([data[-1] ^ 1]))


def chunk_file(storage: Storage, shard: int, suffix: str) -> str:
    folder = f"{state_of(storage)}/chunks/{shard:05d}"
    return f"{folder}/{next(name for name in storage.list(folder) if name.endswith(suffix))}"


def change_json(storage: Storage, path: str, change: Callable[[dict], None]) -> None:
    value = json.loads(storage.read(path) or b"")
    change(value)
    replace(storage, path, json.dumps(value).encode())


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a final file is lost": (lambda s, st: s.discard("data/part-00000-of-00002.parquet"), "is missing"),
    "a final file is cut": (
        lambda s, st: replace(s, "data/part-00001-of-00002.parquet", b"PAR1"),
        "part-00001-of-00002.parquet: is damaged",
    ),
    "rejects changed by a bit": (
        lambda s, st: flip_last_byte(s, "rejects/part-00000-of-00002.jsonl"),
        "is damaged",
    ),
    "metrics are lost": (lambda s, st: s.discard("metrics/part-00000-of-00002.json"), "is missing"),
    "a chunk's data changed by a bit": (
        lambda s, st: flip_last_byte(s, chunk_file(s, 0, ".data.parquet")),
        "data.parquet: is damaged",
    ),
    "a chunk's trace is lost": (lambda s, st: s.discard(chunk_file(s, 1, ".trace.parquet")), "is missing"),
    "a commit record is lost": (
        lambda s, st: s.discard(f"{st}/commits/00000/00001.json"),
        "is missing, though its shard is finished",
    ),
    "a commit record is no JSON": (
        lambda s, st: replace(s, f"{st}/commits/00000/00002.json", b"{"),
        "is damaged",
    ),
    "a commit record counts other rows": (
        lambda s, st: change_json(
            s, f"{st}/commits/00001/00000.json", lambda v: v["counts"].update(ok=v["counts"]["ok"] + 1)
        ),
        "does not add up",
    ),
    "a commit record is of another input": (
        lambda s, st: change_json(
            s, f"{st}/commits/00001/00001.json", lambda v: v["input_version"].update(size=1)
        ),
        "another version of the input",
    ),
    "a commit record stands for another": (
        lambda s, st: replace(
            s, f"{st}/commits/00001/00001.json", s.read(f"{st}/commits/00001/00000.json") or b""
        ),
        "is the record of another chunk",
    ),
    "the order is lost": (
        lambda s, st: s.discard(f"{st}/orders/00000/000000000000.json"),
        "an order that is not on record",
    ),
    "the shard's record is lost": (
        lambda s, st: s.discard(f"{st}/shards/00001.json"),
        "manifest.json: is there, and only 1 shards are finished",
    ),
    "the shard's record is another's": (
        lambda s, st: change_json(
            s, f"{st}/shards/00001.json", lambda v: v["files"]["data"].update(sha256="0" * 64)
        ),
        "is damaged",
    ),
    "the manifest lies": (
        lambda s, st: change_json(s, "manifest.json", lambda v: v["totals"].update(rows=1)),
        "manifest.json: says other than",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_mended_to_the_same_bytes(
    name: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = str(tmp_path / "out")
    with open(shards / "0.jsonl", "ab") as file:
        file.write(b"not json\n")
    run(shards, output)
    wanted = final_bytes(output)
    assert verify_job(open_storage(output), None) is ExitCode.DONE
    assert "verdict   whole" in capsys.readouterr().out
    damage, message = DAMAGES[name]
    storage = open_storage(output)
    damage(storage, state_of(storage))
    assert verify_job(storage, None) is ExitCode.DAMAGED
    out = capsys.readouterr().out
    assert message in out
    assert "/out/" not in out.replace(f"{output}:", "").replace(f"{output}/", ""), "paths are the output's"
    repair_output(open_storage(output), None)
    run(shards, output)
    assert verify(output, tmp_path / "spool").findings == []
    assert final_bytes(output) == wanted


def test_a_whole_run_is_whole_wherever_it_is(output: str, shards: Path, tmp_path: Path):
    run(shards, output)
    verified = verify(output, tmp_path / "spool")
    assert verified.findings == []
    assert (verified.is_finished, verified.num_finished, verified.num_chunks) == (True, 2, 6)
    assert verified.counts["rows"] == 16
    assert verified.num_files == 6 * 2 + 2 * 3, "two files a chunk; data, trace and metrics a shard"
    flip_last_byte(open_storage(output), "data/part-00000-of-00002.parquet")
    found = verify(output, tmp_path / "spool").findings
    assert [(finding.path, finding.shard) for finding in found] == [("data/part-00000-of-00002.parquet", 0)]
    storage = open_storage(output)
    assert repair(storage, state_of(storage).partition("/")[2], found) == [
        "manifest.json",
        f"{state_of(storage)}/shards/00000.json",
        "data/part-00000-of-00002.parquet",
    ], "nothing else is taken away"
    run(shards, output)
    assert verify(output, tmp_path / "spool").findings == []


def test_files_in_another_order_are_found_though_every_hash_is_right(shards: Path, tmp_path: Path):
    """A program's fault, not a disk's: the shard's record agrees with the wrong file."""
    import hashlib

    import pyarrow.parquet as pq

    output = tmp_path / "out"
    run(shards, str(output))
    storage = open_storage(str(output))
    path = output / "data/part-00000-of-00002.parquet"
    table = pq.read_table(path)
    path.unlink()
    pq.write_table(table.take(list(range(table.num_rows))[::-1]), path)
    sha, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    record = f"{state_of(storage)}/shards/00000.json"
    change_json(storage, record, lambda v: v["files"]["data"].update(sha256=sha, num_bytes=size))
    storage.discard("manifest.json")
    found = verify(str(output), tmp_path / "spool").findings
    assert [(finding.path, finding.problem) for finding in found] == [
        ("data/part-00000-of-00002.parquet", "is not what the shard's chunks make")
    ]


def test_a_row_that_is_there_twice_is_found(shards: Path, tmp_path: Path):
    import pyarrow.parquet as pq

    from pipeline.verify import _check_ids

    run(shards, str(tmp_path / "out"))
    table = pq.read_table(
        tmp_path / "out/data/part-00000-of-00002.parquet", columns=["row_id", "sample_index"]
    )
    rows = list(zip(table["row_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
    _check_ids(rows, set())
    with pytest.raises(OutputError, match=r"sample 0 of row .* out of its place"):
        _check_ids([rows[0], rows[0]], set())
    with pytest.raises(OutputError, match="in the shard twice"):
        _check_ids([*rows, rows[0]], set())
    with pytest.raises(OutputError, match="sample 2 of row"):
        _check_ids([("a", 0), ("a", 2)], set())


def test_a_run_in_progress_is_whole_and_its_damage_is_found(tmp_path: Path):
    output, plan = str(tmp_path / "out"), small_plan()
    with open_ledger(open_storage(output), tmp_path / "work", plan) as ledger:
        lease = ledger.claim(0)
        assert lease is not None
        for chunk in (2, 0):
            files = fill(ledger, lease, chunk, FakeEngine(), NO_SUSPECTS)
            ledger.commit_chunk(lease, files, input_version=plan.shards[0].version)
        verified = verify(output, tmp_path / "spool")
        assert verified.findings == []
        assert (verified.is_finished, verified.num_finished, verified.num_chunks) == (False, 0, 2)
        flip_last_byte(open_storage(output), chunk_file(open_storage(output), 0, ".data.parquet"))
        (found,) = verify(output, tmp_path / "spool").findings
        assert (found.shard, found.chunk) == (0, 0)
    assert verify(output, tmp_path / "spool").findings == [found]


def test_a_shard_that_somebody_works_on_is_not_repaired(tmp_path: Path):
    output, plan = str(tmp_path / "out"), small_plan()
    storage = open_storage(output)
    here = ProcessIdentity.of_this_process()
    with open_ledger(storage, tmp_path / "work", plan, owner=here) as ledger:
        lease = ledger.claim(0)
        assert lease is not None
        files = fill(ledger, lease, 0, FakeEngine(), NO_SUSPECTS)
        ledger.commit_chunk(lease, files, input_version=plan.shards[0].version)
        flip_last_byte(storage, chunk_file(storage, 0, ".data.parquet"))
        found = verify(output, tmp_path / "spool").findings
        with pytest.raises(RetryLater, match="another worker holds shard 0, which is damaged"):
            repair(storage, ledger.fingerprint, found, patience_s=4.0, sleep=lambda seconds: None)
        assert storage.size(f"{state_of(storage)}/commits/00000/00000.json"), "nothing was taken away"


def test_without_its_state_a_finished_run_is_verified_by_its_manifest(shards: Path, tmp_path: Path):
    import shutil

    output = tmp_path / "out"
    run(shards, str(output))
    shutil.rmtree(output / "_state")
    assert verify(str(output), tmp_path / "spool").findings == []
    flip_last_byte(open_storage(str(output)), "trace/part-00001-of-00002.parquet")
    (found,) = verify(str(output), tmp_path / "spool").findings
    assert found.path == "trace/part-00001-of-00002.parquet"


def test_foreign_files_are_told_and_left_alone(shards: Path, tmp_path: Path):
    output = tmp_path / "out"
    run(shards, str(output))
    (output / "data" / "copy.parquet").write_bytes(b"x")
    (found,) = verify(str(output), tmp_path / "spool").findings
    assert (found.path, found.problem) == ("data/copy.parquet", "is not of this run")
    with pytest.raises(
        OutputError, match=r"data/copy\.parquet is not of this run and is not removed; move it"
    ):
        repair_output(open_storage(str(output)), None)


def test_gc_takes_only_what_is_old_and_nothing_refers_to(output: str, shards: Path, tmp_path: Path, capsys):
    run(shards, output)
    storage = open_storage(output)
    lost = f"{state_of(storage)}/chunks/00001/00000-0001-0123456789ab.data.parquet"
    assert storage.create(lost, b"an attempt whose worker died") is Outcome.WON
    assert find_garbage(storage, 3600.0).is_empty, "it may be about to be committed"
    assert find_garbage(storage, 0.0).attempts == (lost,)
    assert gc_job(storage, GcSettings(min_age_hours=0.0)) is ExitCode.DONE
    assert f"{storage.url}/{lost}\n1 objects that nothing refers to" in capsys.readouterr().out
    assert storage.size(lost), "it was only told"
    assert gc_job(storage, GcSettings(min_age_hours=0.0, remove=True)) is ExitCode.DONE
    assert storage.size(lost) is None
    assert find_garbage(storage, 0.0).is_empty
    assert verify(output, tmp_path / "spool").findings == []


def test_gc_takes_temporary_files_and_uploads_that_nobody_goes_on_with(
    s3_bucket: str, shards: Path, tmp_path: Path
):
    import s3fs

    folder = uuid.uuid4().hex
    for output in (str(tmp_path / "out"), f"{s3_bucket}/{folder}"):
        run(shards, output)
    temporary = tmp_path / "out/_state/.tidemill-tmp-x.y.1.2-3"
    temporary.write_bytes(b"half")
    old = time.time() - 7200
    os.utime(temporary, (old, old))
    fs: object = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.call_s3("create_multipart_upload", Bucket="bucket", Key=f"{folder}/data/half")  # type: ignore[attr-defined]
    bucket, disk = open_storage(f"{s3_bucket}/{folder}"), open_storage(str(tmp_path / "out"))
    assert bucket.create(".tidemill-probe-1", b"probe") is Outcome.WON
    assert find_garbage(disk, 3600.0).leftovers == ("_state/.tidemill-tmp-x.y.1.2-3",)
    assert find_garbage(bucket, 3600.0).leftovers == ()
    probe, upload = find_garbage(bucket, 0.0).leftovers
    assert probe == ".tidemill-probe-1"
    assert upload.startswith("data/half?uploadId=")
    for storage in (bucket, disk):
        gc_job(storage, GcSettings(min_age_hours=0.0, remove=True))
        assert find_garbage(storage, 0.0).is_empty
        assert verify(storage.url, tmp_path / "spool").findings == []


def test_the_command_needs_to_be_told_no_more_than_the_output(shards: Path, tmp_path: Path, capsys):
    run(shards, str(tmp_path / "out"))
    assert main(["mode=verify", f"output.path={tmp_path / 'out'}"]) == 0
    assert "2 of 2 shards finished" in capsys.readouterr().out
    assert main(["mode=gc", "--yes", f"output.path={tmp_path / 'out'}", "gc.min_age_hours=0"]) == 0
    assert "removed 0 objects" in capsys.readouterr().out
    (tmp_path / "out/manifest.json").write_text("{")
    assert main(["mode=verify", f"output.path={tmp_path / 'out'}"]) == 4
    assert "WRONG     manifest.json: is damaged" in capsys.readouterr().out
    assert main(["mode=verify", f"output.path={tmp_path / 'none'}"]) == 2
    assert "holds no job.json" in capsys.readouterr().err
    assert main(["mode=verify"]) == 2
    assert "output.path is missing" in capsys.readouterr().err


def test_windows_in_any_order_and_rows_of_several_samples_are_whole(tmp_path: Path):
    assert work(open_storage(str(tmp_path / "out")), tmp_path / "work") is not None
    assert verify(str(tmp_path / "out"), tmp_path / "spool").findings == []
