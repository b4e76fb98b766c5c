"""What a worker has open: shards it holds the lease of, chunks with rows read and not committed yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.outputs import EngineStats, RequestOutput
from engine.sampling_params import SamplingParams
from pipeline.lease import Lease
from pipeline.metrics import Metrics
from pipeline.planned_reading import Assignment, PlacedRow
from pipeline.rows import Prompt, Reject
from pipeline.shards import Shard
from pipeline.suspects import Suspects
from pipeline.writer import ChunkWriter


class EngineLike(Protocol):
    """What the worker needs of an engine."""

    @property
    def num_pages(self) -> int: ...

    @property
    def has_unfinished(self) -> bool: ...

    @property
    def num_unfinished(self) -> int: ...

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        *,
        sampling: SamplingParams,
        identity: str,
        expected_output_len: int | None,
    ) -> Any: ...

    def pin_prefix(self, token_ids: Sequence[int]) -> Any:
        """Prompts that begin so are to come: give the pages of this beginning up last."""
        ...

    def release_prefix(self, token_ids: Sequence[int]) -> Any:
        """Undo one `pin_prefix` of the same tokens."""
        ...

    def step(self) -> list[RequestOutput]: ...

    def abort_request(self, request_id: str) -> Any: ...

    def stats(self) -> EngineStats: ...


@dataclass(slots=True)
class OpenChunk:
    """A chunk with rows read, running or done and not committed yet."""

    shard: int
    chunk: int
    start: int  # its places
    stop: int
    writer: ChunkWriter
    metrics: Metrics = field(default_factory=Metrics)
    num_seen: int = 0  # rows taken from the reader
    num_done: int = 0  # rows in the writer
    num_alone: int = 0  # rows waiting to be run with nothing else in flight

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def is_done(self) -> bool:
        return self.num_done == self.num_rows

    @property
    def waits_for_isolation(self) -> bool:
        return self.num_alone > 0 and self.num_done + self.num_alone == self.num_rows


@dataclass(slots=True)
class OpenShard:
    """A shard, or a part of one, that this worker holds the lease of."""

    shard: Shard
    lease: Lease
    suspects: Suspects
    assignment: Assignment | None = None  # what its rows are read for
    todo: set[int] = field(default_factory=set)  # chunks to be run here and not begun
    num_missing: int = 0  # chunks to be run here and not committed
    has_let: bool = False
    in_flight: dict[str, PlacedRow] = field(default_factory=dict)  # by request id

    @property
    def is_shared(self) -> bool:
        """Others run chunks of the shard too."""
        return self.has_let or self.lease.is_part or bool(self.lease.others)

    def begin(self, chunks: Sequence[int], assignment: Assignment) -> None:
        """These chunks are to be run, as the assignment says."""
        self.todo, self.num_missing, self.assignment = set(chunks), len(chunks), assignment

    def give_up(self, chunk: int, places: tuple[int, int]) -> None:
        """Another worker will run a chunk that is not begun."""
        assert self.assignment is not None, "a chunk is to be run, so its rows are assigned"
        self.todo.remove(chunk)
        self.num_missing -= 1
        self.has_let = True
        self.assignment.withdraw(*places)


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted half-open ranges, neighbours joined: ((0, 4), (4, 8), (12, 16)) becomes ((0, 8), (12, 16))."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def quarantine(prompt: Prompt, shard: Shard) -> Reject:
    return Reject(
        shard_index=prompt.shard_index,
        position=prompt.position,
        row_id=prompt.row_id,
        reason="quarantined",
        message=f"{shard.name} row {prompt.position}: ended the process each time it ran, so it is left out",
        source=shard.name,
        excerpt=(prompt.text or "")[:200],
    )
