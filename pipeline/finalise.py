"""A shard's final files, rebuilt from its commit records alone.

Two finalisers of one shard make the same bytes of data/, rejects/ and trace/, so it does not matter which
of them wins. Chunks hold rows in the order that they ran in; here they are put back into input order, a
window at a time, and each file is checked against the hash that was committed.
"""

from __future__ import annotations

import json
import math
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.errors import OutputError
from pipeline.chunk_merge import CommittedWindow, committed_windows, merged_rejects, merged_tables
from pipeline.commits import CommitRecord, FileRef, checked_file, publish_file, retrying, sha256_file
from pipeline.manifest import ShardRecord, check_balance, part_name, shard_counts
from pipeline.openai_batch import error_line, output_line
from pipeline.parquet_files import GroupedWriter
from pipeline.plan import RunPlan
from pipeline.run_state import RunState
from pipeline.schema import RESPONSE, trace_schema
from pipeline.storage import explain

# What the items of a file are counted as.
_COUNTED = {"data": "samples", "trace": "samples", "rejects": "rejected", "errors": "rejected"}

MetricsMerge = Callable[[Iterable[Mapping[str, Any]]], Mapping[str, Any]]


class Finaliser:
    """Makes the final files of shards. `merge_metrics(chunk summaries)` gives the content of metrics/."""

    def __init__(self, state: RunState, plan: RunPlan, spool_dir: Path, merge_metrics: MetricsMerge):
        self._storage = state.storage
        self._state = state
        self._plan = plan
        self._spool_dir = spool_dir
        self._merge_metrics = merge_metrics

    def finalise(self, shard: int, committed: Mapping[int, CommitRecord]) -> ShardRecord:
        """Publish the shard's files and return their record, which is not written yet.

        Raises OutputError when chunks are missing or do not add up, a chunk's file is damaged, or another
        file has the final one's name; RetryLater for a full disk.
        """
        self._spool_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="final-", dir=self._spool_dir) as folder:
            files = {
                kind: self._publish(kind, path, spool)
                for kind, path, spool in self.rebuilt(shard, committed, Path(folder))
            }
        counts = shard_counts(committed.values())
        return ShardRecord(shard=shard, name=self._plan.shards[shard].name, files=files, counts=counts)

    def rebuilt(
        self, shard: int, committed: Mapping[int, CommitRecord], folder: Path
    ) -> Iterator[tuple[str, str, Path]]:
        """Each of the shard's files: its kind, its path in the output and, in `folder`, its content.

        The folder also holds the chunks' files where they must be fetched. Raises as `finalise`.
        """
        records = [committed[chunk] for chunk in sorted(committed)]
        planned = self._plan.shards[shard]
        bounds = [self._plan.chunk_bounds(shard, chunk) for chunk in range(self._plan.num_chunks(shard))]
        if [(record.start, record.stop) for record in records] != bounds:
            raise OutputError(f"shard {shard} ({planned.name}) has chunks missing and cannot be finished yet")

        def windows() -> Iterator[CommittedWindow]:
            """Read anew each time: the orders of a large shard are not held."""
            return committed_windows(self._state.windows(shard, planned.num_rows), records)

        if sum(len(window.records) for window in windows()) != len(records):
            raise OutputError(
                f"{self._storage.url}: the order of shard {shard} ({planned.name}) is not on record; "
                f"remove {self._state.path('commits', f'{shard:05d}')} there and start the same command again"
            )
        counts = shard_counts(records)
        check_balance(counts, planned.num_rows, f"shard {shard} ({planned.name})")
        build = {"data": self._data, "rejects": self._rejects, "trace": self._trace, "metrics": self._metrics}
        if self._plan.is_batch:
            build["errors"] = self._errors
        for kind, write in build.items():
            path = part_name(kind, shard, self._plan.num_shards, self._plan.output_format)
            spool = folder / path.replace("/", "-")
            try:
                num_items = write(spool, windows())
                expected = _COUNTED.get(kind)
                if expected and num_items != counts[expected]:
                    raise OutputError(
                        f"{self._storage.url}/{path} would hold {num_items} rows and {counts[expected]} were "
                        "committed; this is a fault of the program, please report it"
                    )
                is_empty = not spool.stat().st_size
            except OSError as error:
                raise explain(error, spool, sum(record.data.num_bytes for record in records)) from error
            if not is_empty:
                yield kind, path, spool

    def _publish(self, kind: str, path: str, spool: Path) -> FileRef:
        ref = FileRef(path, sha256_file(spool), spool.stat().st_size)
        if publish_file(self._storage, path, spool, ref.sha256, spool.parent):
            return ref
        existing = retrying(lambda: self._storage.local_file(path, spool.parent))
        if kind == "metrics" and existing is not None:
            # It names the attempt that wrote it: whoever was first is as right as we are.
            return FileRef(path, sha256_file(existing), existing.stat().st_size)
        raise OutputError(
            f"{self._storage.url}/{path} exists and is not what the committed chunks make; "
            "move that file away and start the same command again to have it rebuilt"
        )

    def _chunk_file(self, folder: Path, record: CommitRecord, ref: FileRef) -> Path:
        commit = self._state.commit_path(record.shard, record.chunk)
        remedy = f"remove {self._storage.url}/{commit} and start the same command again to redo that chunk"
        return checked_file(self._storage, ref, folder, remedy)

    def _data(self, spool: Path, windows: Iterator[CommittedWindow]) -> int:
        if self._plan.is_batch:
            return self._responses(spool, windows)
        if self._plan.output_format == "jsonl":
            num_rows = 0
            with open(spool, "w", encoding="utf-8", newline="\n") as file:
                for table in self._tables(windows, "data", spool.parent):
                    num_rows += table.num_rows
                    file.writelines(json_line(row) for row in table.to_pylist())
            return num_rows
        return self._write(spool, self._plan.schema, self._tables(windows, "data", spool.parent))

    def _responses(self, spool: Path, windows: Iterator[CommittedWindow]) -> int:
        """The output file of a batch: a line a row, whatever its samples; how many samples there are."""
        num_samples = 0
        with open(spool, "w", encoding="utf-8", newline="\n") as file:
            for table in self._tables(windows, "data", spool.parent):
                num_samples += table.num_rows
                rows = table.select(["row_id", RESPONSE]).to_pylist()
                file.writelines(
                    output_line(r["row_id"], r[RESPONSE]) for r in rows if r[RESPONSE] is not None
                )
        return num_samples

    def _errors(self, spool: Path, windows: Iterator[CommittedWindow]) -> int:
        """The error file of a batch."""
        num_rows = 0
        with open(spool, "w", encoding="utf-8", newline="\n") as file:
            for window in windows:
                for line in merged_rejects(window, partial(self._chunk_file, spool.parent)):
                    file.write(error_line(json.loads(line)))
                    num_rows += 1
        return num_rows

    def _trace(self, spool: Path, windows: Iterator[CommittedWindow]) -> int:
        return self._write(spool, trace_schema(), self._tables(windows, "trace", spool.parent))

    def _tables(self, windows: Iterator[CommittedWindow], kind: str, folder: Path) -> Iterator[pa.Table]:
        for window in windows:
            yield from merged_tables(window, kind, partial(self._chunk_file, folder), folder)

    def _write(self, spool: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
        with GroupedWriter(spool, schema, self._plan.row_group_rows) as writer:
            for table in tables:
                writer.write(table.cast(schema))
            return writer.num_rows

    def _rejects(self, spool: Path, windows: Iterator[CommittedWindow]) -> int:
        num_rows = 0
        with open(spool, "wb") as file:
            for window in windows:
                for line in merged_rejects(window, partial(self._chunk_file, spool.parent)):
                    file.write(line)
                    num_rows += 1
        return num_rows

    def _metrics(self, spool: Path, windows: Iterator[CommittedWindow]) -> int:
        records = [record for window in windows for record in window.records]
        merged = self._merge_metrics(record.metrics for record in records)
        spool.write_text(
            json.dumps(merged, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )
        return len(records)


def json_line(row: Mapping[str, Any]) -> str:
    """A row of data/ as a line of JSON: columns in schema order, bytes in base64, no NaN or infinity."""
    return json.dumps(_json_value(row), ensure_ascii=False, default=str, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value
