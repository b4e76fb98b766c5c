"""The plan of a run, frozen in `_state/<fingerprint>/plan.json`: shards, chunk bounds, versions, columns.

It is made once, by whoever starts first, and read back by everyone after, so that a resumed run cuts its
shards exactly where the first one did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.parquet_files import MAX_GROUP_ROWS
from pipeline.schema import CarriedColumn, data_schema

PLAN_VERSION = 2
OUTPUT_FORMATS = ("parquet", "jsonl", "openai_batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """One input shard: `num_rows` counts every row, bad ones too; `version` pins its content.

    `name` is what people call it (its path relative to the input's root).
    """

    index: int
    name: str
    url: str
    num_rows: int
    version: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Chunk i of a shard is the rows at places [i * chunk_rows, (i + 1) * chunk_rows) of the shard's order
    (pipeline/row_order.py), rejected ones included.

    `output_format` is "parquet", "jsonl" or "openai_batch" and applies to data/ alone, but for batches, which
    have errors/ too; `with_token_ids` fills that column. `created` (Unix seconds) is what answers of batches
    bear.
    `row_group_rows` is the most rows of a row group in the final Parquet files.
    """

    shards: tuple[PlannedShard, ...]
    chunk_rows: int
    carried: tuple[CarriedColumn, ...] = ()
    output_format: str = "parquet"
    with_token_ids: bool = False
    row_group_rows: int = MAX_GROUP_ROWS
    created: int | None = None

    def __post_init__(self) -> None:
        if self.row_group_rows < 1:
            raise ValueError(f"row_group_rows must be at least 1, not {self.row_group_rows}")
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, not {self.chunk_rows}")
        if self.output_format not in OUTPUT_FORMATS:
            raise ValueError(f"output_format must be of {OUTPUT_FORMATS}, not {self.output_format!r}")
        if self.is_batch and self.created is None:
            raise ValueError("answers in OpenAI's form bear a time: created is missing")
        if [shard.index for shard in self.shards] != list(range(len(self.shards))):
            raise ValueError("shards must be numbered 0, 1, 2, ... in order")

    @property
    def is_batch(self) -> bool:
        """The output has OpenAI's batch format."""
        return self.output_format == "openai_batch"

    @property
    def schema(self) -> pa.Schema:
        """Of the chunks' data, and of data/ where that is Parquet."""
        return data_schema(self.carried, with_responses=self.is_batch)

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    def num_chunks(self, shard: int) -> int:
        return -(-self.shards[shard].num_rows // self.chunk_rows)

    def chunk_bounds(self, shard: int, chunk: int) -> tuple[int, int]:
        """The half-open range [start, stop) of a chunk's places."""
        if not 0 <= chunk < self.num_chunks(shard):
            raise IndexError(f"shard {shard} has {self.num_chunks(shard)} chunks, there is no chunk {chunk}")
        start = chunk * self.chunk_rows
        return start, min(start + self.chunk_rows, self.shards[shard].num_rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "plan_version": PLAN_VERSION,
            "chunk_rows": self.chunk_rows,
            "output_format": self.output_format,
            "with_token_ids": self.with_token_ids,
            "row_group_rows": self.row_group_rows,
            **({} if self.created is None else {"created": self.created}),
            "carried": [column.to_json() for column in self.carried],
            "shards": [
                {
                    "index": s.index,
                    "name": s.name,
                    "url": s.url,
                    "num_rows": s.num_rows,
                    "version": dict(s.version),
                }
                for s in self.shards
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunPlan:
        return cls(
            chunk_rows=value["chunk_rows"],
            output_format=value["output_format"],
            with_token_ids=value["with_token_ids"],
            row_group_rows=value["row_group_rows"],
            created=value.get("created"),
            carried=tuple(CarriedColumn.from_json(column) for column in value["carried"]),
            shards=tuple(PlannedShard(**shard) for shard in value["shards"]),
        )
