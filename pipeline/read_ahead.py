"""Read, tokenise and order rows ahead of need, so that the engine never waits for the input.

Two threads for the whole job. One plans: it reads shards one after the other, a window at a time, and settles
the window's order. The other puts the rows of planned windows, in that order, into a buffer bounded in rows
and in tokens. So while a window runs the next one is planned, and no more than one waits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pipeline.planned_reading import Assignment, PlacedRow, PlannedReader, Portion
from pipeline.rows import Prompt, Reject, SourceRow


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """Reading a shard ended with this error; no more of its rows will come."""

    shard_index: int
    error: BaseException


Item = PlacedRow | ReadFailure


class ReadAhead:
    """Turns assignments into items. Use as a context manager: leaving it ends its threads."""

    def __init__(self, reader: PlannedReader, *, max_rows: int = 1024, max_tokens: int = 1_000_000):
        self._reader = reader
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._changed = threading.Condition()
        # All guarded by `_changed`.
        self._items: deque[Item] = deque()
        self._num_tokens = 0
        self._assigned: deque[Assignment] = deque()
        self._not_begun: set[int] = set()  # assigned shards of which no row was taken yet
        self._is_planning = False
        self._planned: deque[tuple[int, Portion | ReadFailure]] = deque()  # with their shard; one at most
        self._is_putting = False
        self._num_to_put = 0  # rows of planned portions that are not in the buffer yet
        self._is_closed = False
        self._threads = [
            threading.Thread(target=target, name=f"tidemill-{name}", daemon=True)
            for name, target in (("plan", self._plan), ("read-ahead", self._put_planned))
        ]

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for thread in self._threads:
            thread.join()

    def assign(self, assignment: Assignment) -> None:
        """Have these rows read after what was assigned before."""
        with self._changed:
            self._not_begun.add(assignment.shard.index)
            self._assigned.append(assignment)
            self._changed.notify_all()

    @property
    def wants_assignment(self) -> bool:
        """All that was assigned is planned and soon put into the buffer, and begun: time for the next shard.

        No more than one shard waits, however small they are: others may have nothing to do.
        """
        with self._changed:
            if not self._items and not self._is_busy:
                return True
            is_planned = not self._assigned and not self._is_planning and not self._planned
            return is_planned and self._num_to_put <= self._max_rows and not self._not_begun

    @property
    def is_exhausted(self) -> bool:
        """Everything assigned has been read and taken."""
        with self._changed:
            return not self._is_busy and not self._items

    def take(self, timeout: float = 0.0) -> Item | None:
        """The next item, or None when none came within `timeout` seconds (or ever will)."""
        with self._changed:
            if not self._items and timeout > 0:
                self._changed.wait_for(lambda: bool(self._items) or not self._is_busy, timeout)
            if not self._items:
                return None
            item = self._items.popleft()
            self._num_tokens -= _num_tokens(item)
            self._not_begun.discard(_shard(item))
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Read no more and drop what was read; returns at once."""
        with self._changed:
            self._is_closed = True
            self._assigned.clear()
            self._planned.clear()
            self._items.clear()
            self._num_tokens = 0
            self._changed.notify_all()

    @property
    def _is_busy(self) -> bool:
        return bool(self._assigned or self._planned) or self._is_planning or self._is_putting

    def _plan(self) -> None:
        while True:
            with self._changed:
                self._is_planning = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_closed or bool(self._assigned))
                if self._is_closed:
                    return
                assignment = self._assigned.popleft()
                self._is_planning = True
            shard = assignment.shard.index
            try:
                for portion in self._reader.portions(assignment, lambda: self._is_closed):
                    self._hand_on(shard, portion)
            except BaseException as error:  # the worker decides whether it ends the shard or the job
                self._hand_on(shard, ReadFailure(shard, error))

    def _hand_on(self, shard: int, portion: Portion | ReadFailure) -> None:
        """Give a portion to the other thread, once it has taken the one before."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not self._planned)
            if self._is_closed:
                return
            self._planned.append((shard, portion))
            self._num_to_put += portion.num_rows if isinstance(portion, Portion) else 0
            self._changed.notify_all()

    def _put_planned(self) -> None:
        while True:
            with self._changed:
                self._is_putting = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_closed or bool(self._planned))
                if self._is_closed:
                    return
                shard, portion = self._planned.popleft()
                self._is_putting = True
                self._changed.notify_all()
            num_put = 0
            try:
                for item in [portion] if isinstance(portion, ReadFailure) else portion.rows:
                    if not self._put(item):
                        return
                    num_put += isinstance(item, PlacedRow)
            except BaseException as error:
                self._put(ReadFailure(shard, error))
            with self._changed:  # what a failure left out will not come
                self._num_to_put -= portion.num_rows - num_put if isinstance(portion, Portion) else 0

    def _put(self, item: Item) -> bool:
        """Append, waiting for room; False when closed."""
        tokens = _num_tokens(item)
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(tokens))
            if self._is_closed:
                return False
            self._items.append(item)
            self._num_tokens += tokens
            self._num_to_put -= isinstance(item, PlacedRow)
            self._changed.notify_all()
        return True

    def _has_room(self, tokens: int) -> bool:
        fits = len(self._items) < self._max_rows and self._num_tokens + tokens <= self._max_tokens
        return fits or not self._items


def _num_tokens(item: Item) -> int:
    if isinstance(item, PlacedRow) and isinstance(item.row, Prompt):
        return len(item.row.token_ids)
    return 0


def _shard(item: Item) -> int:
    return item.row.shard_index if isinstance(item, PlacedRow) else item.shard_index


def batches(rows: Iterator[SourceRow | Reject], size: int) -> Iterator[list[SourceRow | Reject]]:
    """Lists of up to `size` rows."""
    while batch := list(islice(rows, size)):
        yield batch
