"""Parquet files whose bytes follow from their rows alone.

Row groups are cut by the rows' number and size, never by how the rows arrived, and each is written in one
piece, so that a file made from any arrangement of chunks is the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_GROUP_ROWS = 8192
MAX_GROUP_BYTES = 32 * 2**20
READ_ROWS = 256
_NESTED_VALUE_BYTES = 160  # of a list's value that has no fixed size: the top candidates of one token


class GroupedWriter:
    """Writes tables of one schema, in order, as a zstd Parquet file of canonical row groups.

    Holds one row group (at most `group_rows` rows, MAX_GROUP_BYTES and one row) and the table given last.
    """

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int = MAX_GROUP_ROWS):
        self._group_rows = group_rows
        # Through Python's own file, so that a full disk is an OSError with its number.
        self._file = open(path, "wb")  # noqa: SIM115 - closed in close()
        self._schema = schema
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")
        self._pending: list[pa.Table] = []
        self._num_rows = 0
        self._num_bytes = 0
        self.num_rows = 0

    def write(self, table: pa.Table) -> None:
        """Append rows; the table must have the writer's schema."""
        self.num_rows += table.num_rows
        sizes = row_sizes(table)
        start = 0
        for row, size in enumerate(sizes.tolist()):
            self._num_rows += 1
            self._num_bytes += size
            if self._num_rows == self._group_rows or self._num_bytes >= MAX_GROUP_BYTES:
                self._pending.append(table.slice(start, row + 1 - start))
                start = row + 1
                self._flush()
        if start < table.num_rows:
            self._pending.append(table.slice(start))

    def _flush(self) -> None:
        if self._pending:
            # In one piece: where Arrow's arrays were cut must not show in the pages.
            group = pa.concat_tables(self._pending).combine_chunks()
            self._writer.write_table(group, row_group_size=group.num_rows)
        self._pending, self._num_rows, self._num_bytes = [], 0, 0

    def close(self) -> None:
        """Finish the file; without this call it is no Parquet file."""
        try:
            self._flush()
            self._writer.close()
            self._file.close()
        except BaseException:
            self._give_up()
            raise

    def __enter__(self) -> GroupedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: BaseException | TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._give_up()

    def _give_up(self) -> None:
        # The file is no use any more, and closing it may meet the very fault that ended it.
        with suppress(OSError, ValueError, pa.ArrowException):
            self._writer.close()
        self._writer.is_open = False  # or its finaliser tries again
        with suppress(OSError):
            self._file.close()


def write_table(path: Path, table: pa.Table) -> None:
    """A whole table as one file."""
    with GroupedWriter(path, table.schema) as writer:
        writer.write(table)


def read_tables(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A file's rows in order, READ_ROWS at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=READ_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def row_sizes(table: pa.Table) -> np.ndarray:
    """About how many bytes each row takes, i64[rows]: a number that depends on the row's values alone."""
    sizes = np.zeros(table.num_rows, dtype=np.int64)
    for column in table.columns:
        sizes += _value_sizes(column.combine_chunks() if column.num_chunks != 1 else column.chunk(0))
    return sizes


def _value_sizes(array: pa.Array) -> np.ndarray:
    kind = array.type
    if isinstance(array, pa.StructArray):
        return sum((_value_sizes(field) for field in array.flatten()), np.zeros(len(array), dtype=np.int64))
    if _is_list(kind):
        each = _NESTED_VALUE_BYTES if pa.types.is_nested(kind.value_type) or _is_text(kind.value_type) else 8
        return _filled(pc.call_function("list_value_length", [array])) * each
    if _is_text(kind):
        return _filled(pc.call_function("binary_length", [array]))
    return np.full(len(array), _NESTED_VALUE_BYTES if pa.types.is_nested(kind) else 8, dtype=np.int64)


def _filled(lengths: pa.Array) -> np.ndarray:
    """Lengths as i64, a null one counted as 0."""
    return pc.fill_null(lengths.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    return any(test(kind) for test in tests)
