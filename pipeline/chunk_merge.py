"""Rows of committed chunks, put back into input order in bounded memory.

A chunk holds rows from all over its window, sorted by position. Small windows are sorted in memory. A larger
one goes through a local spool: its rows are dealt out to files that each take a range of positions, and each
file is then sorted alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.commits import CommitRecord, FileRef
from pipeline.parquet_files import READ_ROWS, read_tables
from pipeline.row_order import WindowOrder

# Of chunk files, compressed, sorted at one time; and the most files that a window is dealt out to.
SORTED_BYTES = 4 * 2**20
MAX_FILES = 128

OpenFile = Callable[[CommitRecord, FileRef], Path]

_SAMPLE = "sample_index"


@dataclass(frozen=True, slots=True)
class CommittedWindow:
    """A window of a shard and the commits of its chunks, in order; some may not be there yet."""

    order: WindowOrder
    records: tuple[CommitRecord, ...]


def committed_windows(
    windows: Iterator[WindowOrder], committed: Sequence[CommitRecord]
) -> Iterator[CommittedWindow]:
    """Each window with its commits."""
    for order in windows:
        inside = tuple(record for record in committed if order.start <= record.start < order.stop)
        yield CommittedWindow(order, inside)


def merged_tables(
    window: CommittedWindow,
    kind: str,
    open_file: OpenFile,
    spool_dir: Path | None,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """The rows of a window's data ("data") or trace files ("trace") by position, a few at a time.

    Args:
        open_file: a commit's file on this machine.
        spool_dir: where large windows are sorted; None is the system's temporary folder.
        columns: the columns to read; None reads all.
    """
    if window.order.planned is None:
        for record in window.records:
            names = None if columns is None else list(columns)
            yield from read_tables(open_file(record, _ref(record, kind)), names)
        return
    ranges = _ranges(window, kind)
    tables = _placed_tables(window, kind, open_file, columns)
    if len(ranges) == 0:
        yield from _sorted(list(tables))
        return
    with tempfile.TemporaryDirectory(prefix="sort-", dir=spool_dir) as folder:
        num_files = _deal_out(tables, ranges, Path(folder))
        for number in range(num_files):
            path = _part(Path(folder), number)
            if path.exists():
                yield from _sorted(_read_part(path))
                path.unlink()


def merged_rejects(window: CommittedWindow, open_file: OpenFile) -> Iterator[bytes]:
    """The lines of a window's rejects, by position."""
    found: list[tuple[int, bytes]] = []
    for record in window.records:
        found += _rejects(record, open_file)
    for _, line in sorted(found):
        yield line


def _ref(record: CommitRecord, kind: str) -> FileRef:
    return record.data if kind == "data" else record.trace


def _rejects(record: CommitRecord, open_file: OpenFile) -> list[tuple[int, bytes]]:
    if record.rejects is None:
        return []
    with open(open_file(record, record.rejects), "rb") as file:
        return [(json.loads(line)["position"], line) for line in file]


def _ranges(window: CommittedWindow, kind: str) -> np.ndarray:
    """The first positions of all files but the first; none where one is enough."""
    num_bytes = sum(_ref(record, kind).num_bytes for record in window.records)
    num_files = min(MAX_FILES, -(-num_bytes // SORTED_BYTES))
    start, stop = window.order.start, window.order.stop
    return np.unique(np.linspace(start, stop, num_files, endpoint=False).astype(np.int64))[1:]


def _placed_tables(
    window: CommittedWindow, kind: str, open_file: OpenFile, columns: Sequence[str] | None
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Each chunk's rows with their positions, i64[rows], ascending inside a chunk."""
    for record in window.records:
        rejected = {position for position, _ in _rejects(record, open_file)}
        positions = sorted(window.order.positions(record.start, record.stop))
        run = np.array([each for each in positions if each not in rejected], dtype=np.int64)
        names = None if columns is None else list(dict.fromkeys([*columns, _SAMPLE]))
        num_rows = 0
        for table in read_tables(open_file(record, _ref(record, kind)), names):
            # A row's samples follow each other, the first of them numbered 0.
            rows = num_rows - 1 + np.cumsum(table[_SAMPLE].to_numpy() == 0)
            num_rows = int(rows[-1]) + 1 if len(rows) else num_rows
            yield run[rows], table if columns is None else table.select(list(columns))


def _sorted(parts: Sequence[tuple[np.ndarray, pa.Table]]) -> Iterator[pa.Table]:
    if not parts:
        return
    positions = np.concatenate([positions for positions, _ in parts])
    order = np.argsort(positions, kind="stable")
    table = pa.concat_tables([table for _, table in parts])
    for start in range(0, len(order), READ_ROWS):
        yield table.take(order[start : start + READ_ROWS])


def _deal_out(parts: Iterator[tuple[np.ndarray, pa.Table]], ranges: np.ndarray, folder: Path) -> int:
    """Write rows to a file for each range of positions; returns how many ranges there are."""
    writers: dict[int, tuple[Any, pa.RecordBatchStreamWriter]] = {}
    name = "tidemill.position"
    try:
        for positions, table in parts:
            table = table.append_column(name, pa.array(positions))
            cuts = [0, *np.searchsorted(positions, ranges).tolist(), len(positions)]
            for number, (start, stop) in enumerate(pairwise(cuts)):
                if start == stop:
                    continue
                if number not in writers:
                    # Through Python's own file, so that a full disk is an OSError with its number.
                    file = open(_part(folder, number), "wb")  # noqa: SIM115 - closed below
                    writers[number] = (file, pa.ipc.new_stream(file, table.schema))
                writers[number][1].write_table(table.slice(start, stop - start))
        for file, writer in writers.values():
            writer.close()
            file.close()
    except BaseException:
        for file, _ in writers.values():
            with suppress(OSError):
                file.close()
        raise
    return len(ranges) + 1


def _read_part(path: Path) -> list[tuple[np.ndarray, pa.Table]]:
    with open(path, "rb") as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
    last = table.num_columns - 1
    return [(table.column(last).to_numpy(), table.remove_column(last))]


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.arrow"
