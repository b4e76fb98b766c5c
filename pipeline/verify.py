"""`mode=verify`: read everything that a run has made again, and say what is missing or damaged.

    findings = Verifier(storage, spool_dir).run().findings

Every record is read before what it refers to, and nothing that is referred to is ever removed, so a run in
progress is checked as it stands: what workers add meanwhile is not looked at, and nothing is taken for
missing.

Of a chunk: its record, its files' hashes, schema, row counts and ids, rejects inside its window. Of a
finished shard: its files' hashes, that they are what its chunks make (order and ids included), and the
balance of its rows. Of a finished run: that the manifest says the same. Ids are compared within a shard.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import OutputError
from pipeline.commits import CommitRecord, FileRef, parse_record, retrying, sha256_file
from pipeline.finalise import Finaliser
from pipeline.fingerprint import canonical_json
from pipeline.manifest import ShardRecord, check_balance, manifest, part_name, shard_counts, sum_counts
from pipeline.plan import PlannedShard, RunPlan
from pipeline.row_order import WindowOrder, order_path
from pipeline.run_state import MANIFEST, RunState, read_job
from pipeline.schema import trace_schema
from pipeline.storage import Storage

KINDS = ("data", "rejects", "errors", "trace", "metrics")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something missing or damaged: where, and what is wrong. `shard` and `chunk`: what it is a part of; a
    chunk is None where whole shards, or final files, are meant. `is_foreign`: it is not this program's.
    """

    path: str
    problem: str
    shard: int | None = None
    chunk: int | None = None
    is_foreign: bool = False


@dataclass(slots=True)
class Verified:
    """What was read, and what is wrong with it. `counts` adds up what is committed, as its records say."""

    num_shards: int = 0
    num_finished: int = 0
    num_chunks: int = 0
    num_files: int = 0
    num_bytes: int = 0
    is_finished: bool = False
    counts: dict[str, int] = field(default_factory=lambda: sum_counts(()))
    findings: list[Finding] = field(default_factory=list)


class Verifier:
    """Verifies one output; `run` once. `spool_dir` takes what is fetched, and what is built to compare."""

    def __init__(self, storage: Storage, spool_dir: Path):
        self._storage = storage
        self._spool_dir = spool_dir
        self._done = Verified()

    def run(self) -> Verified:
        """Raises OutputError when the folder is no output at all."""
        job = read_job(self._storage)
        if job is None:
            raise OutputError(f"{self._storage.url} holds no job.json, so it is not an output of Tidemill")
        state = RunState(self._storage, job["fingerprint"])
        stored = state.read(MANIFEST)  # before the shards: what it names must be there
        self._done.is_finished = stored is not None
        try:
            plan = state.plan()
        except OutputError as error:
            self._find(state.path("plan.json"), str(error))
            return self._done
        if plan is None and stored is not None:  # _state was removed when all was finished
            self._files_of_manifest(stored)
            return self._done
        if plan is None:
            self._find(state.path("plan.json"), "is missing, and with it what the run was to make")
            return self._done
        self._done.num_shards = plan.num_shards
        finished = set(state.finished_shards())
        records = []
        for planned in plan.shards:
            with tempfile.TemporaryDirectory(prefix="verify-", dir=self._spool_dir) as folder:
                record = self._shard(state, plan, planned, planned.index in finished, Path(folder))
            records += [record] if record is not None else []
        self._look_for_foreign_files(plan)
        if stored is not None:
            self._manifest(stored, job["fingerprint"], plan, records)
        return self._done

    def _find(self, path: str, problem: str, shard: int | None = None, chunk: int | None = None) -> None:
        self._done.findings.append(Finding(path, problem, shard, chunk))

    def _shard(
        self, state: RunState, plan: RunPlan, planned: PlannedShard, is_finished: bool, folder: Path
    ) -> ShardRecord | None:
        """Check a shard; the record of a finished one, if it can be read."""
        shard, num_before = planned.index, len(self._done.findings)
        committed: dict[int, CommitRecord] = {}
        chunks = state.committed_chunks(shard)
        for chunk in chunks:
            path = state.commit_path(shard, chunk)
            record = self._try(path, shard, chunk, lambda c=chunk: state.commit(shard, c))
            if record is not None and (record.shard, record.chunk) == (shard, chunk):
                committed[chunk] = record
            elif record is not None:
                self._find(path, "is the record of another chunk", shard, chunk)
        ids: set[str] = set()
        left = dict(committed)
        for window in self._windows(state, planned):
            for chunk in [c for c, each in left.items() if window.start <= each.start < window.stop]:
                record = left.pop(chunk)
                self._chunk(
                    state, plan, record, window if window.sha256 == record.order else None, ids, folder
                )
        for record in left.values():
            self._chunk(state, plan, record, None, ids, folder)
        self._done.counts = sum_counts([self._done.counts, *(record.counts for record in committed.values())])
        if not is_finished:
            return None
        self._done.num_finished += 1
        record = self._try(state.shard_path(shard), shard, None, lambda: state.finished_shard(shard))
        for chunk in sorted(set(range(plan.num_chunks(shard))) - set(chunks)):
            self._find(
                state.commit_path(shard, chunk), "is missing, though its shard is finished", shard, chunk
            )
        if record is None:
            return None
        self._try(
            state.shard_path(shard), shard, None, lambda: check_balance(record.counts, planned.num_rows, "it")
        )
        for ref in record.files.values():
            self._try(ref.path, shard, None, lambda ref=ref: self._file(ref, folder))
        if len(self._done.findings) == num_before:
            self._compare(state, plan, record, committed, folder)
        return record

    def _try(self, path: str, shard: int, chunk: int | None, check: Callable[[], Any]) -> Any:
        """The check's result; what it raises is a finding, and the result None."""
        try:
            return check()
        except OutputError as error:
            self._find(path, str(error), shard, chunk)
        except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
            self._find(path, f"cannot be read: {' '.join(str(error).split())}", shard, chunk)
        return None

    def _windows(self, state: RunState, planned: PlannedShard) -> Iterator[WindowOrder]:
        """The recorded windows up to the first that is missing or damaged, one at a time."""
        start = 0
        while start < planned.num_rows:
            path = order_path(state.folder, planned.index, start)
            data = state.read(path)
            if data is None:
                return
            window = self._try(path, planned.index, None, lambda d=data, p=path: WindowOrder.from_bytes(d, p))
            if window is None:
                return
            yield window
            start = window.stop

    def _chunk(
        self,
        state: RunState,
        plan: RunPlan,
        record: CommitRecord,
        window: WindowOrder | None,
        ids: set[str],
        folder: Path,
    ) -> None:
        """Check a commit record and its files; `window` is the one it was made in, if that is on record."""
        self._done.num_chunks += 1
        path = state.commit_path(record.shard, record.chunk)
        self._try(path, record.shard, record.chunk, lambda: _check_commit(plan, record, window))
        self._chunk_files(plan, record, window, ids, folder)

    def _chunk_files(
        self,
        plan: RunPlan,
        record: CommitRecord,
        window: WindowOrder | None,
        ids: set[str],
        folder: Path,
    ) -> None:
        shard, chunk, counts = record.shard, record.chunk, record.counts
        data, trace = (
            self._try(
                ref.path,
                shard,
                chunk,
                lambda ref=ref, schema=schema: self._table(ref, schema, counts["samples"], folder),
            )
            for ref, schema in ((record.data, plan.schema), (record.trace, trace_schema()))
        )
        if data is not None:
            self._try(record.data.path, shard, chunk, lambda: _check_ids(data, ids))
        if data is not None and trace is not None and data != trace:
            self._find(record.trace.path, "names other rows than the data of its chunk", shard, chunk)
        if record.rejects is not None:
            ref = record.rejects
            self._try(ref.path, shard, chunk, lambda: self._rejects(ref, record, window, folder))
        elif counts["rejected"]:
            self._find(record.data.path, "has rejected rows and no file of them", shard, chunk)

    def _file(self, ref: FileRef, folder: Path) -> Path:
        """The file on this machine; OutputError unless it is there with the content it must have."""
        path = retrying(lambda: self._storage.local_file(ref.path, folder))
        if path is None:
            raise OutputError("is missing")
        if path.stat().st_size != ref.num_bytes or sha256_file(path) != ref.sha256:
            raise OutputError("is damaged: its content is not what was committed")
        self._done.num_files += 1
        self._done.num_bytes += ref.num_bytes
        return path

    def _table(self, ref: FileRef, schema: pa.Schema, num_rows: int, folder: Path) -> list[tuple[str, int]]:
        """Row id and sample index of each row of a Parquet file that has this schema."""
        with pq.ParquetFile(self._file(ref, folder)) as file:
            if not file.schema_arrow.equals(schema, check_metadata=True):
                raise OutputError("has another schema than the run's")
            table = file.read(["row_id", "sample_index"])
        if table.num_rows != num_rows:
            raise OutputError(f"holds {table.num_rows} rows and {num_rows} were committed")
        return list(zip(table["row_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))

    def _rejects(self, ref: FileRef, record: CommitRecord, window: WindowOrder | None, folder: Path) -> None:
        lines = self._file(ref, folder).read_bytes().splitlines()
        positions = [json.loads(line)["position"] for line in lines]
        if len(lines) != record.counts["rejected"] or positions != sorted(set(positions)):
            raise OutputError(f"holds {len(lines)} rejects and {record.counts['rejected']} were committed")
        if window is not None and not set(positions) <= set(window.positions(record.start, record.stop)):
            raise OutputError("holds rows of another chunk")

    def _compare(
        self,
        state: RunState,
        plan: RunPlan,
        record: ShardRecord,
        committed: Mapping[int, CommitRecord],
        folder: Path,
    ) -> None:
        """Build the final files again: what order, ids and schema must be, they are."""
        finaliser = Finaliser(state, plan, folder, lambda summaries: {})
        expected = {}
        for kind, path, spool in finaliser.rebuilt(record.shard, committed, folder):
            expected[kind] = (path, sha256_file(spool))
        for kind in ("data", "rejects", "errors", "trace"):
            ref = record.files.get(kind)
            found = (ref.path, ref.sha256) if ref is not None else None
            if found != expected.get(kind):
                path = ref.path if ref is not None else expected[kind][0]
                self._find(path, "is not what the shard's chunks make", record.shard)
        if record.counts != shard_counts(committed.values()):
            self._find(state.shard_path(record.shard), "counts other rows than its chunks hold", record.shard)

    def _look_for_foreign_files(self, plan: RunPlan) -> None:
        for kind in KINDS:
            ours = {
                part_name(kind, shard, plan.num_shards, plan.output_format)
                for shard in range(plan.num_shards)
            }
            for path in (f"{kind}/{name}" for name in retrying(lambda kind=kind: self._storage.list(kind))):
                if path not in ours:
                    self._done.findings.append(Finding(path, "is not of this run", is_foreign=True))

    def _files_of_manifest(self, stored: bytes) -> None:
        try:
            content = parse_record(stored, MANIFEST)
            records = [
                ShardRecord.from_bytes(json.dumps(each).encode(), MANIFEST) for each in content["shards"]
            ]
        except (OutputError, KeyError, TypeError):
            self._find(MANIFEST, "is damaged")
            return
        self._done.num_shards = self._done.num_finished = len(records)
        self._done.counts = sum_counts(record.counts for record in records)
        for record in records:
            with tempfile.TemporaryDirectory(prefix="verify-", dir=self._spool_dir) as folder:
                for ref in record.files.values():
                    self._try(
                        ref.path, record.shard, None, lambda ref=ref, to=folder: self._file(ref, Path(to))
                    )

    def _manifest(
        self, stored: bytes, fingerprint: str, plan: RunPlan, records: Iterable[ShardRecord]
    ) -> None:
        try:
            found = parse_record(stored, MANIFEST)
        except OutputError:
            self._find(MANIFEST, "is damaged")
            return
        expected = manifest(fingerprint, records)
        if expected["num_shards"] < plan.num_shards:
            self._find(MANIFEST, f"is there, and only {expected['num_shards']} shards are finished and whole")
        elif canonical_json(found) != canonical_json(expected):
            self._find(MANIFEST, "says other than the records of the shards")


def _check_commit(plan: RunPlan, record: CommitRecord, window: WindowOrder | None) -> None:
    """Raise OutputError for a commit record that does not fit the plan, or itself."""
    planned = plan.shards[record.shard]
    if record.chunk >= plan.num_chunks(record.shard) or (
        (record.start, record.stop) != plan.chunk_bounds(record.shard, record.chunk)
    ):
        raise OutputError(f"holds places [{record.start}, {record.stop}), which is not what was planned")
    if canonical_json(record.input_version) != canonical_json(planned.version):
        raise OutputError("was made from another version of the input than was planned")
    check_balance(record.counts, record.stop - record.start, "it")
    if window is None:
        raise OutputError("was made in an order that is not on record")


def _check_ids(rows: list[tuple[str, int]], ids: set[str]) -> None:
    """Samples of a row follow each other from 0, and no row is there twice in the shard."""
    last: tuple[str, int] | None = None
    for row_id, sample in rows:
        if sample != (last[1] + 1 if last is not None and last[0] == row_id else 0):
            raise OutputError(f"has sample {sample} of row {row_id!r} out of its place")
        if sample == 0 and row_id in ids:
            raise OutputError(f"holds row {row_id!r}, which is in the shard twice")
        ids.add(row_id)
        last = (row_id, sample)
