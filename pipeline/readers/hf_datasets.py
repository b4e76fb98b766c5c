"""Hugging Face datasets: a hub id at a pinned revision, or a folder written by `Dataset.save_to_disk`.

Rows are read as Arrow, memory-mapped, so features are never decoded: an image column fetches nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, InputError, RetryLater
from pipeline.input_files import errors_named, file_version, filesystem, one_line, scheme_of
from pipeline.readers.arrow_rows import BATCH_ROWS, rows_of
from pipeline.rows import Reject, SourceRow

if TYPE_CHECKING:
    from datasets import Dataset

    from pipeline.shards import InputSettings, Shard

HUB = "hub:"
"""Begins the URL of a hub dataset: `hub:owner/name`. Anything else is a local folder."""


def is_saved_dataset(folder: str) -> bool:
    """Whether `folder` was written by `save_to_disk`, by the files that it always writes."""
    return os.path.isfile(os.path.join(folder, "dataset_dict.json")) or (
        os.path.isfile(os.path.join(folder, "state.json"))
        and os.path.isfile(os.path.join(folder, "dataset_info.json"))
    )


def locate(path: str, revision: str | None) -> str:
    """The URL that its shards carry. ConfigError for what is neither a saved folder nor a hub id."""
    if scheme_of(path) != "file":
        raise ConfigError(f"{path}: a dataset is a hub id or a local folder; copy the folder here first")
    fs, folder = filesystem(path)
    if fs.isdir(folder):
        if not is_saved_dataset(folder):
            raise InputError(
                f"{folder}: not a folder written by save_to_disk; set input.format=parquet or jsonl"
            )
        if revision is not None:
            raise ConfigError(f"input.revision={revision} has no meaning for the folder {folder}; remove it")
        return folder
    if path.startswith((".", "/", "~")) or not 1 <= len(path.split("/")) <= 2:
        raise InputError(f"{path}: no such folder, and not a hub id (owner/name)")
    if revision is None:
        raise ConfigError(
            f"{path}: a hub dataset needs input.revision=<commit>, so that a resumed run reads the same"
        )
    return HUB + path


def describe(url: str, split: str | None, revision: str | None) -> tuple[str, int, int, dict[str, Any]]:
    """(split name, number of rows, bytes on disk, version) of the dataset at `url`."""
    open_dataset.cache_clear()  # the folder may have been written again since
    dataset = open_dataset(url, split, revision)
    name = str(dataset.split) if dataset.split is not None else split or "data"
    version: dict[str, Any] = {"split": split, "revision": revision}
    if url.startswith(HUB):
        version["fingerprint"] = dataset._fingerprint
    else:
        version["files_sha256"] = _folder_version(url)
    num_bytes = sum(os.path.getsize(file["filename"]) for file in dataset.cache_files)
    return name, len(dataset), num_bytes, version


def current_version(shard: Shard) -> dict[str, Any]:
    if shard.url.startswith(HUB):
        return dict(shard.version)  # a pinned revision does not change
    with errors_named(shard.url):
        return shard.version | {"files_sha256": _folder_version(shard.url)}


def count_rows(shard: Shard) -> int:
    start, stop = _slice(shard)
    return stop - start


def column_names(shard: Shard) -> list[str]:
    return list(_dataset(shard).column_names)


def read_rows(
    shard: Shard, settings: InputSettings, start: int, stop: int | None, columns: Sequence[str] | None
) -> Iterator[SourceRow | Reject]:
    dataset = _dataset(shard)
    first, last = _slice(shard)
    if last > len(dataset):
        raise InputError(
            f"{shard.url}: has {len(dataset)} rows now, fewer than the {last} planned; plan the run anew"
        )
    num_rows = last - first
    stop = num_rows if stop is None else min(stop, num_rows)
    kept = [name for name in dataset.column_names if columns is None or name in set(columns)]
    if not kept:  # nothing to decode; each row is there, without any of the columns
        for position in range(start, stop):
            yield SourceRow(shard.index, position, {}, shard.source, None, shard.first_row)
        return
    with errors_named(shard.url):
        tables = dataset.select_columns(kept).with_format("arrow")
        for position in range(start, stop, BATCH_ROWS):
            table = tables[first + position : first + min(position + BATCH_ROWS, stop)]
            yield from rows_of(table, shard, settings, position)


@lru_cache(maxsize=4)
def open_dataset(url: str, split: str | None, revision: str | None) -> Dataset:
    """The dataset, memory-mapped. InputError, naming the splits where one has to be chosen."""
    import datasets  # half a second, and only this format needs it

    try:
        if url.startswith(HUB):
            found = datasets.load_dataset(url.removeprefix(HUB), split=split, revision=revision)
        else:
            found = datasets.load_from_disk(url)
    except ConnectionError as error:
        raise RetryLater(f"{url}: cannot be fetched now: {one_line(error)}; start again later") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        message = (
            f"{url}: not a dataset that can be read: {one_line(error)}; check input.path and input.revision"
        )
        raise InputError(message) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            chosen = "no input.split is given" if split is None else f"there is no split {split!r}"
            raise InputError(f"{url}: {chosen}; choose one of {', '.join(sorted(map(str, found)))}")
        return found[split]
    if split is not None and str(found.split) != split:
        raise InputError(
            f"{url}: holds the split {found.split}, not {split!r}; remove input.split or correct it"
        )
    return found


def _dataset(shard: Shard) -> Dataset:
    return open_dataset(shard.url, shard.version["split"], shard.version["revision"])


def _slice(shard: Shard) -> tuple[int, int]:
    if shard.slice is None:
        raise ValueError(f"shard {shard.name} of a dataset has no row range")
    return shard.slice


def _folder_version(folder: str) -> str:
    """A hash over the names, sizes and ends of the folder's files."""
    fs, path = filesystem(folder)
    versions = {}
    for file in sorted(fs.find(path)):
        version = file_version(fs, file)
        versions[os.path.relpath(file, path)] = [version["size"], version["ends_sha256"]]
    return hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()
