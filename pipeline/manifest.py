"""The records that say a shard is final (`_state/.../shards/<shard>.json`) and a run is (`manifest.json`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import OutputError
from pipeline.commits import CommitRecord, FileRef, damaged, parse_record
from pipeline.exact_duplicates import num_duplicates
from pipeline.fingerprint import canonical_json

MANIFEST_VERSION = 1

COUNTS = ("rows", "ok", "rejected", "duplicates", "samples", "prompt_tokens", "generated_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A finished shard and its files by kind: data, rejects, trace, metrics; errors of a batch.

    A shard without rejects has no rejects file, and one without results no data file where data/ is JSONL.
    In `counts`, as in the manifest's totals, rows = ok + rejected + duplicates: a duplicate is a row with a
    result that asks for the same generation as an earlier row of its shard (pipeline/exact_duplicates.py).
    """

    shard: int
    name: str
    files: Mapping[str, FileRef]
    counts: Mapping[str, int]

    def to_bytes(self) -> bytes:
        return canonical_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> ShardRecord:
        value = parse_record(data, place)
        try:
            value["files"] = {kind: FileRef(**file) for kind, file in value["files"].items()}
            return cls(**value)
        except (KeyError, TypeError) as error:
            raise damaged(place) from error


def part_name(kind: str, shard: int, num_shards: int, output_format: str) -> str:
    """The path of a shard's final file: `data/part-00000-of-00012.parquet`."""
    data = "jsonl" if output_format == "openai_batch" else output_format
    suffixes = {"data": data, "trace": "parquet", "rejects": "jsonl", "errors": "jsonl", "metrics": "json"}
    return f"{kind}/part-{shard:05d}-of-{num_shards:05d}.{suffixes[kind]}"


def sum_counts(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = dict.fromkeys(COUNTS, 0)
    for part in parts:
        for name in COUNTS:
            total[name] += part[name]
    return total


def shard_counts(records: Iterable[CommitRecord]) -> dict[str, int]:
    """The counts of a shard from its chunks': rows that repeat one of another chunk are duplicates too."""
    records = list(records)
    counts = sum_counts(record.counts for record in records)
    duplicates = num_duplicates(record.duplicate_keys for record in records)
    counts["ok"] += counts["duplicates"] - duplicates
    counts["duplicates"] = duplicates
    return counts


def check_balance(counts: Mapping[str, int], num_rows: int, what: str) -> None:
    """Raise OutputError unless rows in = ok + rejected + duplicates = `num_rows`."""
    out = counts["ok"] + counts["rejected"] + counts["duplicates"]
    if not num_rows == counts["rows"] == out:
        raise OutputError(
            f"{what} does not add up: {num_rows} rows in, but {counts['ok']} ok + "
            f"{counts['rejected']} rejected + "
            f"{counts['duplicates']} duplicates = {out}; this is a fault of the program, please report it"
        )


def manifest(fingerprint: str, records: Iterable[ShardRecord]) -> dict[str, Any]:
    """The content of manifest.json: the totals, and every file with its hash."""
    shards = sorted(records, key=lambda record: record.shard)
    return {
        "manifest_version": MANIFEST_VERSION,
        "fingerprint": fingerprint,
        "num_shards": len(shards),
        "totals": sum_counts(record.counts for record in shards),
        "shards": [record.to_json() for record in shards],
    }
