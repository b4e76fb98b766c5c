"""Commit records: `commits/<shard>/<chunk>.json`, created once, decide which attempt at a chunk counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FileRef:
    """An object of the output with what it must hold; the path is relative to the output folder."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """One committed chunk. `counts`: rows, ok, rejected, duplicates, samples (rows = ok + rejected + duplicates)."""

    shard: int
    chunk: int
    attempt: str
    start: int
    stop: int
    data: FileRef
    trace: FileRef
    rejects: FileRef | None
    counts: Mapping[str, int]
    input_version: Mapping[str, Any]
    metrics: Mapping[str, Any]
