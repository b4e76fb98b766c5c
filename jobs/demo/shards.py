"""The demo's four shards: 248 docstrings and 8 rows spoilt on purpose, one for each kind of mistake."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.docstrings import Docstring, docstrings

NUM_ROWS = 256
ROWS_PER_SHARD = 64
ROWS_PER_ROW_GROUP = 16
MIN_CHARS, MAX_CHARS = 80, 600
# About 12,000 tokens: more than the embedded model can read at all.
OVER_LONG_CHARS = 48_000

Row = dict[str, Any]


def write_shards(folder: Path) -> list[Path]:
    """Write the shards and return their paths, in the order in which they are read."""
    folder.mkdir(parents=True, exist_ok=True)
    bad = _bad_rows()
    good = iter(_spread(docstrings(MIN_CHARS, MAX_CHARS), NUM_ROWS - sum(len(rows) for rows in bad)))
    writers = (
        ("0.parquet", _parquet),
        ("1.jsonl", _jsonl),
        ("2.parquet", _parquet),
        ("3.jsonl.gz", _jsonl_gz),
    )
    paths = []
    for index, (suffix, write) in enumerate(writers):
        rows: list[Row | str] = [_row(next(good)) for _ in range(ROWS_PER_SHARD - len(bad[index]))]
        if index == 0:
            first = rows[0]
        for position, row in sorted(bad[index].items()):
            # The duplicate repeats the very first row's id, with a text of its own.
            rows.insert(position, first if row == "duplicate" else row)
        path = folder / f"docstrings-{suffix}"
        write(path, rows)
        paths.append(path)
    return paths


def _bad_rows() -> list[dict[int, Row | str]]:
    """For each shard: position in the shard -> the spoilt row (a string is the line as it stands)."""
    everything = "\n\n".join(entry.text for entry in docstrings(MIN_CHARS, MAX_CHARS))
    return [
        {
            9: {"id": "demo.null", "module": "demo", "docstring": None},
            41: {"id": "demo.over_long", "module": "demo", "docstring": everything[:OVER_LONG_CHARS]},
        },
        {
            5: '{"id": "demo.torn_line", "module": "demo", "docstring": "This line was cut sho',
            23: '{"id": "demo.missing_column", "module": "demo"}',
            50: '["demo.not_an_object", "demo", "An array where an object belongs."]',
        },
        {30: "duplicate"},
        {
            12: {"id": "demo.empty", "module": "demo", "docstring": ""},
            37: '{"id": "demo.lone_surrogate", "module": "demo", "docstring": "Half a pair: \\ud83d"}',
        },
    ]


def _spread(entries: list[Docstring], num: int) -> list[Docstring]:
    """`num` of the entries at even distances, so that every module has its share."""
    if len(entries) < num:
        raise RuntimeError(
            f"this Python has {len(entries)} docstrings of the wanted length, fewer than {num}"
        )
    return [entries[i * len(entries) // num] for i in range(num)]


def _row(entry: Docstring) -> Row:
    return {"id": entry.name, "module": entry.module, "docstring": entry.text}


def _parquet(path: Path, rows: list[Row | str]) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("id", "module", "docstring")])
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema), path, row_group_size=ROWS_PER_ROW_GROUP, compression="zstd"
    )


def _lines(rows: list[Row | str]) -> bytes:
    return b"".join((row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows)


def _jsonl(path: Path, rows: list[Row | str]) -> None:
    path.write_bytes(_lines(rows))


def _jsonl_gz(path: Path, rows: list[Row | str]) -> None:
    path.write_bytes(gzip.compress(_lines(rows), mtime=0))
