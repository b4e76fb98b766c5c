"""Opening what a run made, for notebooks and scripts: finished, stopped, or still going on.

    run = open_run("out/demo")
    run.to_pandas()                # the results; also "rejects" and "trace"
    run.state()                    # how far each shard is, and who is at work on it
    for row in run.rows(): ...     # in input order, never all in memory

Of a run in progress, what is committed is read: whole chunks, each exactly once. To read a finished run
without this package: `datasets.load_dataset("parquet", data_dir="<output>/data")` (split "train"), the
same with `data_dir="<output>"` (split "part"), or `pyarrow.dataset.dataset("<output>/data")`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from engine.errors import OutputError
from pipeline.chunk_merge import committed_windows, merged_rejects, merged_tables
from pipeline.claims import read_claim, read_claims
from pipeline.commits import CommitRecord, FileRef, parse_record, retrying
from pipeline.manifest import ShardRecord, sum_counts
from pipeline.metrics import merge_chunks
from pipeline.parquet_files import READ_ROWS, read_tables
from pipeline.plan import RunPlan
from pipeline.run_state import MANIFEST, RunState, read_job
from pipeline.schema import data_schema, trace_schema
from pipeline.storage import Storage, open_storage

if TYPE_CHECKING:
    import pandas

Kind = Literal["rows", "rejects", "trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """How far a shard is. `state`: "finished", "running", "waiting" (for a worker) or "INPUT_CHANGED"."""

    shard: int
    name: str
    state: str
    num_rows: int
    num_rows_committed: int
    num_chunks: int
    num_chunks_committed: int
    holder: str | None


def open_run(path: str | Path) -> Run:
    """Open an output folder (`output.path`). Raises OutputError, in one line, when it is none."""
    storage = open_storage(str(path))
    job = read_job(storage)
    if job is None:
        raise OutputError(
            f"{storage.url} holds no job.json, so it is not an output of Tidemill; "
            "give the folder that output.path named"
        )
    return Run(storage, job)


class Run:
    """One run's output. Everything is read when asked for, so asking again shows a running job's progress."""

    def __init__(self, storage: Storage, job: Mapping[str, Any]):
        self.path = storage.url
        self.job = job
        self._storage = storage
        self._state = RunState(storage, job["fingerprint"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, without secrets."""
        return self.job["config"]

    def manifest(self) -> dict[str, Any] | None:
        """The content of manifest.json; None while the run is not finished."""
        data = retrying(lambda: self._storage.read(MANIFEST))
        return None if data is None else parse_record(data, f"{self.path}/{MANIFEST}")

    @property
    def is_finished(self) -> bool:
        return self.manifest() is not None

    def counts(self) -> dict[str, int]:
        """What is committed so far: rows, ok, rejected, duplicates, samples, prompt and generated tokens."""
        parts = []
        for shard, finished in self._shards():
            if finished is not None:
                parts.append(finished.counts)
            else:
                parts.extend(record.counts for record in self._state.committed(shard).values())
        return sum_counts(parts)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The results in input order, one dict per sample."""
        return self._dicts("rows", columns)

    def rejects(self) -> Iterator[dict[str, Any]]:
        """The rows that could not be run, with `reason` and `message`, in input order."""
        return self._dicts("rejects", None)

    def trace(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """How each sample's run went: cached tokens, times in seconds, attempt; in input order."""
        return self._dicts("trace", columns)

    def _dicts(self, kind: Kind, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        for table in self.tables(kind, columns):
            yield from table.to_pylist()

    def to_arrow(self, kind: Kind = "rows", columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a kind as one table."""
        tables = list(self.tables(kind, columns))
        if tables:
            return pa.concat_tables(tables, promote_options="default")
        return self._schema(kind, columns).empty_table()

    def to_pandas(self, kind: Kind = "rows", columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """All rows of a kind as a data frame."""
        return self.to_arrow(kind, columns).to_pandas()

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of every shard that has any, with its `shard` number and `name`; committed chunks
        count.
        """
        found = []
        for shard, finished in self._shards():
            if finished is not None and "metrics" in finished.files:
                ref = finished.files["metrics"]
                data = retrying(lambda path=ref.path: self._storage.read(path))
                if data is None:
                    raise self._missing(ref)
                content = parse_record(data, f"{self.path}/{ref.path}")
                name = finished.name
            else:
                records = self._state.committed(shard)
                if not records:
                    continue
                content = merge_chunks(record.metrics for record in records.values())
                name = self._planned().shards[shard].name
            found.append({"shard": shard, "name": name, **content})
        return found

    def state(self) -> list[ShardState]:
        """How far each shard is; empty until the run has its plan."""
        plan, finished = self._state.plan(), self._finished()
        states = []
        for planned in plan.shards if plan else ():
            shard = planned.index
            records = self._state.committed(shard)
            holder = None if shard in finished else self._holder(shard)
            if shard in finished:
                state = "finished"
            elif holder is not None:
                state = "running"
            else:
                state = "INPUT_CHANGED" if self._state.list("ended", f"{shard:05d}") else "waiting"
            states.append(
                ShardState(
                    shard=shard,
                    name=planned.name,
                    state=state,
                    num_rows=planned.num_rows,
                    num_rows_committed=sum(record.stop - record.start for record in records.values()),
                    num_chunks=plan.num_chunks(shard) if plan else 0,
                    num_chunks_committed=len(records),
                    holder=holder,
                )
            )
        return states

    def _holder(self, shard: int) -> str | None:
        """Who may be at work on a shard: the process that took it, and those that it let parts to."""
        claims = read_claims(self._storage, self._state.folder, shard)
        owners = [read_claim(self._storage, self._state.folder, shard, key).owner for key in claims.open_keys]
        alive = [f"{owner.host} process {owner.pid}" for owner in owners if not owner.is_gone()]
        return ", ".join(dict.fromkeys(alive)) or None

    def _finished(self) -> dict[int, ShardRecord]:
        """Finished shards, from the manifest if there is one: _state may have been removed since."""
        content = self.manifest()
        if content is None:
            return self._state.finished()
        place = f"{self.path}/{MANIFEST}"
        records = [ShardRecord.from_bytes(json.dumps(each).encode(), place) for each in content["shards"]]
        return {record.shard: record for record in records}

    def _shards(self) -> Iterator[tuple[int, ShardRecord | None]]:
        """Every shard in order, with its record if it is finished."""
        finished, plan = self._finished(), self._state.plan()
        for shard in range(plan.num_shards) if plan else sorted(finished):
            yield shard, finished.get(shard)

    def _planned(self) -> RunPlan:
        plan = self._state.plan()
        if plan is None:
            raise OutputError(f"{self.path} has no plan; its _state folder was removed or never written")
        return plan

    def tables(self, kind: Kind, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        self._schema(kind, columns)  # an unknown column is an error also when there are no rows
        names = None if columns is None else list(columns)
        for shard, finished in self._shards():
            with tempfile.TemporaryDirectory(prefix="tidemill-read-") as folder:  # for what must be fetched
                yield from self._shard_tables(kind, shard, finished, names, Path(folder))

    def _shard_tables(
        self, kind: Kind, shard: int, finished: ShardRecord | None, names: list[str] | None, folder: Path
    ) -> Iterator[pa.Table]:
        final = finished.files.get("data" if kind == "rows" else kind) if finished else None
        committed = tuple(self._state.committed(shard).values())
        # Chunks are Parquet whatever data/ is, and so keep the types that JSON lines lose.
        if final is not None and (not committed or kind == "rejects" or final.path.endswith(".parquet")):
            yield from self._final_tables(self._file(final, folder), names)
        elif finished is None or kind == "rows":
            yield from self._chunk_tables(kind, shard, committed, names, folder)

    def _final_tables(self, path: Path, names: list[str] | None) -> Iterator[pa.Table]:
        if path.suffix == ".parquet":
            yield from read_tables(path, names)
            return
        with open(path, encoding="utf-8") as file:
            for table in _json_tables(file):
                yield table if names is None else table.select(names)

    def _chunk_tables(
        self,
        kind: Kind,
        shard: int,
        committed: Sequence[CommitRecord],
        names: list[str] | None,
        folder: Path,
    ) -> Iterator[pa.Table]:
        """What is committed of a shard, in input order."""
        if not committed:
            return

        def open_file(record: CommitRecord, ref: FileRef) -> Path:
            return self._file(ref, folder)

        num_rows = self._planned().shards[shard].num_rows
        for window in committed_windows(self._state.windows(shard, num_rows), committed):
            if kind == "rejects":
                lines = merged_rejects(window, open_file)
                yield from _json_tables(line.decode() for line in lines)
            else:
                source = "data" if kind == "rows" else "trace"
                yield from merged_tables(window, source, open_file, None, names)

    def _file(self, ref: FileRef, folder: Path) -> Path:
        path = retrying(lambda: self._storage.local_file(ref.path, folder))
        if path is None:
            raise self._missing(ref)
        return path

    def _missing(self, ref: FileRef) -> OutputError:
        return OutputError(
            f"{self.path}/{ref.path} is missing; start the job's command again to have it rebuilt from its "
            "chunks"
        )

    def _schema(self, kind: Kind, columns: Sequence[str] | None) -> pa.Schema:
        if kind not in ("rows", "rejects", "trace"):
            raise ValueError(f"kind is {kind!r}; it must be 'rows', 'rejects' or 'trace'")
        if kind == "rejects":
            return pa.schema([])
        plan = self._state.plan()
        schema = trace_schema() if kind == "trace" else (plan.schema if plan else data_schema())
        if columns is None:
            return schema
        if plan is not None and (unknown := [name for name in columns if name not in schema.names]):
            raise ValueError(f"there is no column {unknown[0]!r}; there are {', '.join(schema.names)}")
        return pa.schema([schema.field(name) for name in columns if name in schema.names])


def _json_tables(lines: Iterable[str]) -> Iterator[pa.Table]:
    rest = iter(lines)
    while batch := list(islice(rest, READ_ROWS)):
        yield pa.Table.from_pylist([json.loads(line) for line in batch])
