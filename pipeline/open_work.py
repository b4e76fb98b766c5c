"""What a worker has open: shards it holds the lease of, chunks with rows read and not committed yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.drawn import DrawnTokens
from engine.errors import RequestError
from engine.outputs import EngineStats, RequestOutput
from engine.sampling_params import SamplingParams
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.metrics import Metrics
from pipeline.partials import PartialRow, Partials
from pipeline.planned_reading import Assignment, PlacedRow
from pipeline.rows import Prompt, Reject
from pipeline.shards import Shard
from pipeline.suspects import Suspects
from pipeline.writer import ChunkWriter


@dataclass(frozen=True, slots=True)
class Refusal:
    """An engine of another thread cannot run a request that `add_request` had handed on."""

    request_id: str
    error: RequestError


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
        drawn: Sequence[DrawnTokens] | None,
    ) -> Any: ...

    def pin_prefix(self, token_ids: Sequence[int]) -> Any:
        """Prompts that begin so are to come: give the pages of this beginning up last."""
        ...

    def release_prefix(self, token_ids: Sequence[int]) -> Any:
        """Undo one `pin_prefix` of the same tokens."""
        ...

    def step(self) -> Sequence[RequestOutput | Refusal]: ...

    def drawn_tokens(self, request_id: str) -> Sequence[DrawnTokens] | None:
        """What another engine can go on from, a sample each; None where there is nothing."""
        ...

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
    begun: Mapping[str, PartialRow] = field(default_factory=dict)  # what was saved of its rows, by id
    done: list[PartialRow | None] = field(default_factory=list)  # what may be saved of those in the writer
    results: dict[str, Any] = field(default_factory=dict)  # computed here, for the request cache, by key
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
    suspects: Suspects = field(default_factory=Suspects)
    partials: Partials | None = None  # what others saved of its rows
    assignment: Assignment | None = None  # what its rows are read for
    todo: set[int] = field(default_factory=set)  # chunks to be run here and not begun
    num_missing: int = 0  # chunks to be run here and not committed
    has_let: bool = False
    in_flight: dict[str, PlacedRow] = field(default_factory=dict)  # by request id
    has_changed: bool = False  # rows in flight since the lease was told

    @property
    def is_untouched(self) -> bool:
        """Nobody else has ever worked on it."""
        return self.lease.is_first and not self.has_let

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


@dataclass(frozen=True, slots=True)
class CutShort:
    """A chunk that was given up: whose it was, and how far its rows had come."""

    lease: Lease
    chunk: int
    attempt: str
    rows: tuple[PartialRow, ...]


class OpenWork:
    """The shards and chunks that a worker has open."""

    def __init__(self, ledger: Ledger, engine: EngineLike):
        self._ledger = ledger
        self._engine = engine
        self.shards: dict[int, OpenShard] = {}
        self.chunks: dict[tuple[int, int], OpenChunk] = {}  # oldest first

    @property
    def metrics(self) -> list[Metrics]:
        """Of each open chunk."""
        return [chunk.metrics for chunk in self.chunks.values()]

    def wants(self, placed: PlacedRow) -> bool:
        """False for what was read ahead of a shard that was dropped, or a chunk that was let, since."""
        index, chunk = placed.row.shard_index, self._number_of(placed)
        opened = self.shards.get(index)
        if opened is None or placed.assignment is not opened.assignment:
            return False
        return chunk in opened.todo or (index, chunk) in self.chunks

    def chunk_of(self, placed: PlacedRow) -> OpenChunk:
        """The chunk that a wanted row is in; opened if this is the first of its rows."""
        number = self._number_of(placed)
        key = (placed.row.shard_index, number)
        if key not in self.chunks:
            start, stop = self._ledger.plan.chunk_bounds(*key)
            opened = self.shards[placed.row.shard_index]
            opened.todo.discard(number)
            self.chunks[key] = OpenChunk(
                *key,
                start=start,
                stop=stop,
                writer=self._ledger.writer(opened.lease, number, placed.window),
                begun=opened.partials.of_chunk(number) if opened.partials else {},
            )
        return self.chunks[key]

    def take_back(self, request_id: str) -> PlacedRow | None:
        """The row whose request has ended; None where its shard or chunk was given up since."""
        opened = self.shards.get(int(request_id.partition(":")[0]))
        placed = opened.in_flight.pop(request_id, None) if opened else None
        if opened is not None and placed is not None:
            opened.has_changed = True
        return placed

    def abandon(self, key: tuple[int, int]) -> CutShort:
        """Give up a chunk; how far its rows have come."""
        chunk = self.chunks.pop(key)
        opened = self.shards[chunk.shard]
        rows = list(chunk.done)
        for request_id, placed in list(opened.in_flight.items()):
            if chunk.start <= placed.place < chunk.stop:
                drawn = self._engine.drawn_tokens(request_id)
                assert isinstance(placed.row, Prompt), "a rejected row is never run"
                rows.append(PartialRow.of(placed.row, drawn or ()))
                self._engine.abort_request(request_id)
                del opened.in_flight[request_id]
                opened.has_changed = True
        chunk.writer.abandon()
        return CutShort(
            opened.lease, chunk.chunk, chunk.writer.attempt, tuple(row for row in rows if row is not None)
        )

    def drop(self, index: int) -> None:
        """Stop working on a shard: nothing of it that is not committed will be."""
        for key in [key for key in self.chunks if key[0] == index]:
            self.abandon(key)
        self.shards.pop(index).lease.release()

    def _number_of(self, placed: PlacedRow) -> int:
        return placed.place // self._ledger.plan.chunk_rows


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
