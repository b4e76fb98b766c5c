"""The input as a list of shards: which files, in which order, pinned to which version.

A shard is one input file, or one declared slice of a Hugging Face dataset. Its `name` is its path relative
to the input's root (a folder itself, a file's or glob's folder, the common folder of a list), so names,
and the row ids made from them, do not change when the data is moved as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.rows import Reject, SourceRow

InputFormat = Literal["auto", "parquet", "jsonl", "datasets"]
ShardFormat = Literal["parquet", "jsonl", "datasets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSettings:
    """Where the rows are and how far the reader trusts them. Sizes are in bytes.

    path: a file, a folder, a glob, or a list of them, each a local path or an fsspec URL; for
        format="datasets" a hub id (with `revision`) or a folder written by `save_to_disk`.
    id_column: a column of unique strings or integers; None makes ids from name, position and content.
    carry_columns: input columns copied to the output.
    split, revision, rows_per_shard: for format="datasets" alone.
    max_line_bytes: a longer JSONL line is rejected, skipped without being held.
    max_json_depth: nesting of arrays and objects in a JSONL line.
    max_decoded_bytes: the most that one row of a Parquet file or dataset may decode to.
    """

    path: str | Sequence[str]
    format: InputFormat = "auto"
    id_column: str | None = None
    carry_columns: tuple[str, ...] = ()
    split: str | None = None
    revision: str | None = None
    rows_per_shard: int = 10_000
    max_line_bytes: int = 16 * 2**20
    max_json_depth: int = 64
    max_decoded_bytes: int = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One input file or dataset slice. `version` pins its content (JSON values only).

    `slice` is the half-open row range of a dataset slice, None for a file.
    """

    index: int
    name: str
    url: str
    format: ShardFormat
    num_bytes: int
    version: dict[str, Any]
    slice: tuple[int, int] | None = None


def list_shards(settings: InputSettings) -> list[Shard]:
    """All shards, sorted by name. InputError when nothing matches or a path cannot be read."""
    raise NotImplementedError


def current_version(shard: Shard) -> dict[str, Any]:
    """The version of the shard's content now; compare with `shard.version`. InputError if it is gone."""
    raise NotImplementedError


def count_rows(shard: Shard) -> int:
    """Rows in the shard, rejected ones included. InputError when the file is damaged."""
    raise NotImplementedError


def read_rows(
    shard: Shard,
    settings: InputSettings,
    start: int = 0,
    stop: int | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[SourceRow | Reject]:
    """Rows [start, stop) of the shard in order, one item for each position, in bounded memory.

    columns: the columns to keep (None keeps all); a row need not have them.
    Raises InputError, naming the file, when the file is damaged, truncated or gone.
    """
    raise NotImplementedError
