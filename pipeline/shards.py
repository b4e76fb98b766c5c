"""The input as a list of shards: which files, in which order, pinned to which version, and their rows.

A shard is one input file, or one declared slice of a Hugging Face dataset. Its `name` is its path relative
to the input's root (a folder itself, a file's or glob's folder, the common folder of a list), so names,
and the row ids made from them, do not change when the data is moved as a whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import ConfigError, InputError
from engine.openai_requests import ENDPOINTS
from pipeline.input_files import errors_named, file_version, filesystem
from pipeline.input_paths import ShardFormat, find_files
from pipeline.readers import hf_datasets, jsonl, parquet
from pipeline.rows import Reject, SourceRow

InputFormat = Literal["auto", "parquet", "jsonl", "datasets", "openai_batch"]
CUSTOM_ID = "custom_id"
"""The column of batch files that names a row."""
_READERS = {"parquet": parquet, "jsonl": jsonl, "datasets": hf_datasets}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSettings:
    """Where the rows are and how far the reader trusts them. Sizes are in bytes.

    path: a file, a folder, a glob, or a list of them, each a local path or an fsspec URL; for
        format="datasets" a hub id (with `revision`) or a folder written by `save_to_disk`.
    format: "auto" goes by each file's extension. In a folder, files of other extensions are left out.
        "openai_batch" is JSONL whose lines are requests to OpenAI's API; ids are their `custom_id`.
    id_column: a column of unique strings or integers; None makes ids from name, position and content.
    carry_columns: input columns copied to the output; a JSONL row without one carries null.
    order: how rows run; results are in input order either way. "prefix" runs rows that begin alike one after
        the other, longer ones first; tens of thousands may be read before the first one runs. "input" runs
        rows as they come.
    endpoint, served_model: for batch files alone: the URL and the model that every line has to name; null
        takes any.
    split, revision, rows_per_shard: for datasets alone; a shard is so many rows.
    max_line_bytes: a longer JSONL line is rejected, skipped without being held.
    max_json_depth: nesting of arrays and objects in a JSONL line.
    max_decoded_bytes: the most that one row of a Parquet file or dataset may decode to.
    """

    path: str | Sequence[str]
    format: InputFormat = "auto"
    id_column: str | None = None
    carry_columns: tuple[str, ...] = ()
    order: Literal["prefix", "input"] = "prefix"
    endpoint: str | None = None
    served_model: str | None = None
    split: str | None = None
    revision: str | None = None
    rows_per_shard: int = 10_000
    max_line_bytes: int = 16 * 2**20
    max_json_depth: int = 64
    max_decoded_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if not self.paths or not all(isinstance(path, str) and path.strip() for path in self.paths):
            raise ConfigError(f"input.path={self.path!r}: give a file, a folder, a glob or a list of them")
        for name, low, high in (
            ("rows_per_shard", 1, 10**9),
            ("max_line_bytes", 1, 2**30),
            ("max_json_depth", 1, 200),  # the parser's own stack ends at several times that
            ("max_decoded_bytes", 1, 2**31),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"input.{name}={getattr(self, name)}: expected {low} to {high}")
        self._check_batch()
        twice = [name for i, name in enumerate(self.carry_columns) if name in self.carry_columns[:i]]
        if twice:
            raise ConfigError(f"input.carry_columns names {twice[0]!r} twice; name it once")

    def _check_batch(self) -> None:
        if self.format == "openai_batch":
            if self.id_column not in (None, CUSTOM_ID):
                raise ConfigError(f"input.id_column={self.id_column}: rows of batch files have {CUSTOM_ID!r}")
            object.__setattr__(self, "id_column", CUSTOM_ID)
            if self.endpoint not in (None, *ENDPOINTS):
                raise ConfigError(f"input.endpoint={self.endpoint}: choose one of {', '.join(ENDPOINTS)}")
            return
        for name in ("endpoint", "served_model"):
            if getattr(self, name) is not None:
                value = getattr(self, name)
                raise ConfigError(
                    f"input.{name}={value} is for batch files; remove it or set input.format=openai_batch"
                )

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


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

    @property
    def source(self) -> str:
        """The file's name, or the split's: what rows say they come from, however a dataset is sliced."""
        return self.name if self.slice is None else self.name.removesuffix(_suffix(self.slice))

    @property
    def first_row(self) -> int:
        """The row of the source at which the shard begins."""
        return 0 if self.slice is None else self.slice[0]


def list_shards(settings: InputSettings) -> list[Shard]:
    """All shards, sorted by name.

    Raises ConfigError for a path that is not allowed, InputError when nothing matches, when a file cannot be
    reached, or when a Parquet file or dataset lacks a column that `settings` names for every row.
    """
    if settings.format == "datasets" or (settings.format == "auto" and _is_saved_dataset(settings)):
        shards = _dataset_shards(settings)
    else:
        for name in ("split", "revision"):
            if getattr(settings, name) is not None:
                value = getattr(settings, name)
                raise ConfigError(
                    f"input.{name}={value} is for datasets; remove it or set input.format=datasets"
                )
        shards = []
        for index, file in enumerate(find_files(settings.paths, _file_format(settings))):
            with errors_named(file.url):
                version = file_version(file.fs, file.path, file.info)
            shard = Shard(
                index=index,
                name=file.name,
                url=file.url,
                format=file.format,
                num_bytes=int(version["size"] or 0),
                version=version,
            )
            shards.append(shard)
    return shards


def _file_format(settings: InputSettings) -> str:
    """Batch files are read as any JSONL; what their lines mean is the prompts' business."""
    return "jsonl" if settings.format == "openai_batch" else settings.format


def check_columns(shards: Sequence[Shard], columns: Sequence[str]) -> None:
    """InputError when a Parquet file or dataset has no column of one of these names.

    For columns that shape the output without being the prompt (carried ones, the id): better to stop before
    the run than to reject every row, or to carry nothing.
    """
    for shard in shards:
        if shard.format == "jsonl":
            continue
        names = _READERS[shard.format].column_names(shard)
        for column in columns:
            if column not in names:
                near = difflib.get_close_matches(column, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(names)[:20])}"
                raise InputError(f"{shard.url}: no column {column!r}; {hint}")


def current_version(shard: Shard) -> dict[str, Any]:
    """The version of the shard's content now; compare with `shard.version`. InputError if it is gone."""
    if shard.format == "datasets":
        return hf_datasets.current_version(shard)
    with errors_named(shard.url):
        fs, path = filesystem(shard.url)
        return file_version(fs, path)


def count_rows(shard: Shard) -> int:
    """Rows in the shard, rejected ones included. InputError when the file is damaged."""
    return _READERS[shard.format].count_rows(shard)


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
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"rows [{start}, {stop}) are no range")
    return _READERS[shard.format].read_rows(shard, settings, start, stop, columns)


def _is_saved_dataset(settings: InputSettings) -> bool:
    if len(settings.paths) != 1 or "://" in settings.paths[0]:
        return False
    _, path = filesystem(settings.paths[0])
    return hf_datasets.is_saved_dataset(path)


def _dataset_shards(settings: InputSettings) -> list[Shard]:
    if len(settings.paths) != 1:
        raise ConfigError(f"input.path names {len(settings.paths)} datasets; give one dataset a run")
    url = hf_datasets.locate(settings.paths[0], settings.revision)
    split, num_rows, num_bytes, version = hf_datasets.describe(url, settings.split, settings.revision)
    shards = []
    for index, start in enumerate(range(0, num_rows, settings.rows_per_shard)):
        bounds = (start, min(start + settings.rows_per_shard, num_rows))
        shard = Shard(
            index=index,
            name=split + _suffix(bounds),
            url=url,
            format="datasets",
            num_bytes=num_bytes * (bounds[1] - bounds[0]) // num_rows,
            version=version,
            slice=bounds,
        )
        shards.append(shard)
    if not shards:
        raise InputError(f"{url}: the dataset has no rows")
    return shards


def _suffix(bounds: tuple[int, int]) -> str:
    return f"[{bounds[0]}:{bounds[1]}]"
