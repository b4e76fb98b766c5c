"""The records that say a shard is final (`_state/.../shards/<shard>.json`) and a run is (`manifest.json`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.commits import FileRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A finished shard: its files by kind (data, rejects, trace, metrics; a kind with no rows may be absent)."""

    shard: int
    url: str
    files: Mapping[str, FileRef]
    counts: Mapping[str, int]
    metrics: Mapping[str, Any]
