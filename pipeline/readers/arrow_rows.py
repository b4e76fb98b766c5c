"""Arrow batches to rows, shared by the readers of Parquet and of datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.rows import Reject, SourceRow, excerpt, place, printable

if TYPE_CHECKING:
    from pipeline.shards import InputSettings, Shard

BATCH_ROWS = 8
"""Rows decoded at once. Small, because a few bytes of dictionary can stand for a gigabyte of rows."""


def rows_of(
    batch: pa.RecordBatch | pa.Table, shard: Shard, settings: InputSettings, position: int
) -> Iterator[SourceRow | Reject]:
    """The batch's rows, the first of them at `position`."""
    names = batch.schema.names
    is_small = batch.nbytes <= settings.max_decoded_bytes
    for i in range(batch.num_rows):

        def reject(reason: str, message: str, at: int = position + i) -> Reject:
            where = place(shard.source, shard.first_row + at, None)
            return Reject(
                shard.index, at, None, reason, printable(f"{where}: {message}"), shard.source, excerpt("")
            )

        if not is_small and (num_bytes := batch.slice(i, 1).nbytes) > settings.max_decoded_bytes:
            limit = f"{settings.max_decoded_bytes} (input.max_decoded_bytes)"
            yield reject("row_too_large", f"decodes to {num_bytes} bytes, more than {limit}")
            continue
        columns: dict[str, Any] = {}
        name = ""
        try:
            for name in names:
                columns[name] = batch.column(name)[i].as_py()
        except UnicodeDecodeError as error:
            yield reject("not_utf8", f"column {name!r} is not UTF-8: {error.reason}; store it as UTF-8 text")
        except (ValueError, OverflowError) as error:  # such as a date past the year 9999
            yield reject(
                "wrong_type", f"column {name!r} cannot be read: {excerpt(str(error))}; store it as text"
            )
        else:
            yield SourceRow(shard.index, position + i, columns, shard.source, None, shard.first_row)
