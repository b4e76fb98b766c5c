"""Parquet: row groups streamed a few rows at a time, only the columns asked for.

Limits hold for what is decoded, not for what the file declares: 500 bytes of Parquet can stand for 200 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from engine.errors import InputError
from pipeline.input_files import damaged, errors_named, filesystem, open_file
from pipeline.readers.arrow_rows import BATCH_ROWS, rows_of
from pipeline.rows import Reject, SourceRow

if TYPE_CHECKING:
    from pipeline.shards import InputSettings, Shard

BUFFER_BYTES = 1024 * 1024
"""How much of a column is fetched at a time; without it a whole row group's columns would be held."""


def count_rows(shard: Shard) -> int:
    with _open(shard) as parquet:
        return parquet.metadata.num_rows


def column_names(shard: Shard) -> list[str]:
    """The file's top-level columns."""
    with _open(shard) as parquet:
        return list(parquet.schema_arrow.names)


def read_rows(
    shard: Shard, settings: InputSettings, start: int, stop: int | None, columns: Sequence[str] | None
) -> Iterator[SourceRow | Reject]:
    with _open(shard) as parquet:
        names = parquet.schema_arrow.names
        kept = names if columns is None else [name for name in names if name in set(columns)]
        position = 0  # of the next row group's first row
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            first, last = (
                max(start - position, 0),
                num_rows if stop is None else min(stop - position, num_rows),
            )
            if first < last:
                yield from _group_rows(shard, settings, parquet, group, position, (first, last), kept)
            position += num_rows


def _group_rows(
    shard: Shard,
    settings: InputSettings,
    parquet: pq.ParquetFile,
    group: int,
    position: int,
    wanted: tuple[int, int],
    columns: list[str],
) -> Iterator[SourceRow | Reject]:
    """Rows [first, last) of one row group, whose first row is at `position`."""
    first, last = wanted
    if not columns:  # nothing to decode; each row is there, without any of the columns
        for i in range(first, last):
            yield SourceRow(shard.index, position + i, {}, shard.name)
        return
    row = 0  # in the group, of the next batch's first row
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
        # A dotted name selects nested columns too, so keep exactly the ones meant.
        batch = batch.select(columns)
        low, high = max(first - row, 0), min(last - row, batch.num_rows)
        if low < high:
            yield from rows_of(batch.slice(low, high - low), shard, settings, position + row + low)
        row += batch.num_rows
        if row >= last:
            return
    error = EOFError(f"row group {group} ends after {row} rows")
    raise InputError(damaged(shard.url, error))


@contextmanager
def _open(shard: Shard) -> Iterator[pq.ParquetFile]:
    fs, path = filesystem(shard.url)
    with (
        errors_named(shard.url),
        open_file(fs, path) as file,
        pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet,
    ):
        names = list(parquet.schema_arrow.names)
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"{shard.url}: two columns are named {min(twice)!r}; give each its own name")
        metadata = parquet.metadata
        held = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        if held != metadata.num_rows:
            error = EOFError(f"the footer says {metadata.num_rows} rows and its row groups {held}")
            raise InputError(damaged(shard.url, error))
        yield parquet
