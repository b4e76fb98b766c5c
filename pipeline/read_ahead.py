"""Read and tokenise rows ahead of need, in one thread, so that the engine never waits for the input.

One thread for the whole job: shards are assigned to it one after the other, and rows come out in that order
through a buffer bounded in rows and in tokens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from pipeline.rows import Prompt, Reject, SourceRow
from pipeline.shards import InputSettings, Shard, read_rows

BATCH_ROWS = 64  # tokenised in one call


class Builder(Protocol):
    """What is needed of a PromptBuilder."""

    @property
    def columns_needed(self) -> tuple[str, ...] | None: ...

    def build_many(self, rows: list[SourceRow | Reject]) -> list[Prompt | Reject]: ...


@dataclass(frozen=True, slots=True)
class Assignment:
    """Half-open row ranges of a shard that are still to be run, in order."""

    shard: Shard
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """Reading a shard ended with this error; no more of its rows will come."""

    shard_index: int
    error: Exception


Item = Prompt | Reject | ReadFailure


class ReadAhead:
    """A thread that turns assignments into items. Use as a context manager: leaving it ends the thread."""

    def __init__(
        self,
        builder: Builder,
        input_settings: InputSettings,
        *,
        max_rows: int = 1024,
        max_tokens: int = 1_000_000,
    ):
        self._builder = builder
        self._settings = input_settings
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._changed = threading.Condition()
        # All guarded by `_changed`.
        self._items: deque[Item] = deque()
        self._num_tokens = 0
        self._assigned: deque[Assignment] = deque()
        self._is_reading = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="tidemill-read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._thread.join()

    def assign(self, assignment: Assignment) -> None:
        """Have these ranges read after what was assigned before."""
        with self._changed:
            self._assigned.append(assignment)
            self._changed.notify_all()

    @property
    def wants_assignment(self) -> bool:
        """Everything assigned has been read (though not all of it taken): time for the next shard."""
        with self._changed:
            return not self._assigned and not self._is_reading

    @property
    def is_exhausted(self) -> bool:
        """Everything assigned has been read and taken."""
        with self._changed:
            return not self._assigned and not self._is_reading and not self._items

    def take(self, timeout: float = 0.0) -> Item | None:
        """The next item, or None when none came within `timeout` seconds (or ever will)."""
        with self._changed:
            if not self._items and timeout > 0:
                self._changed.wait_for(lambda: bool(self._items) or not self._busy, timeout)
            if not self._items:
                return None
            item = self._items.popleft()
            self._num_tokens -= _num_tokens(item)
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Read no more and drop what was read; returns at once."""
        with self._changed:
            self._is_closed = True
            self._assigned.clear()
            self._items.clear()
            self._num_tokens = 0
            self._changed.notify_all()

    @property
    def _busy(self) -> bool:
        return bool(self._assigned) or self._is_reading

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_reading = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_closed or bool(self._assigned))
                if self._is_closed:
                    return
                assignment = self._assigned.popleft()
                self._is_reading = True
            try:
                for items in self._read(assignment):
                    if not self._put(items):
                        break
            except (
                Exception
            ) as error:  # handed to the worker, which decides whether it ends the shard or the job
                self._put([ReadFailure(assignment.shard.index, error)])

    def _read(self, assignment: Assignment) -> Iterator[list[Prompt | Reject]]:
        if not assignment.ranges:
            return
        # One pass from the first wanted row to the last: beginning anew for each range would read a JSONL
        # file from its first line every time.
        first, last = assignment.ranges[0][0], assignment.ranges[-1][1]
        columns = self._builder.columns_needed
        rows = read_rows(assignment.shard, self._settings, first, last, columns)
        wanted = (row for row in rows if any(a <= row.position < b for a, b in assignment.ranges))
        for batch in batches(wanted, BATCH_ROWS):
            yield self._builder.build_many(batch)

    def _put(self, items: Iterable[Item]) -> bool:
        """Append, waiting for room; False when closed."""
        for item in items:
            tokens = _num_tokens(item)
            with self._changed:
                self._changed.wait_for(lambda tokens=tokens: self._is_closed or self._has_room(tokens))
                if self._is_closed:
                    return False
                self._items.append(item)
                self._num_tokens += tokens
                self._changed.notify_all()
        return True

    def _has_room(self, tokens: int) -> bool:
        fits = len(self._items) < self._max_rows and self._num_tokens + tokens <= self._max_tokens
        return fits or not self._items


def _num_tokens(item: Item) -> int:
    return len(item.token_ids) if isinstance(item, Prompt) else 0


def batches(rows: Iterator[SourceRow | Reject], size: int) -> Iterator[list[SourceRow | Reject]]:
    """Lists of up to `size` rows."""
    while batch := list(islice(rows, size)):
        yield batch
