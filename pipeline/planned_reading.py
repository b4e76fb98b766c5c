"""A shard's rows in the order they run in: window by window, each planned, settled, and handed on.

What a portion holds is read from the input once and tokenised once. A window that was planned before (by an
earlier start, or by another worker) is read again for the rows that are still missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from engine.errors import InputError
from pipeline import prefix_plan
from pipeline.prefix_hashes import SeenPrefixes
from pipeline.prefix_plan import WindowPlanner
from pipeline.prompt_spool import PromptSpool
from pipeline.row_order import WindowOrder
from pipeline.rows import Prompt, Reject, SourceRow
from pipeline.shards import InputSettings, Shard, read_rows

BATCH_ROWS = 64  # tokenised in one call


class Builder(Protocol):
    """What is needed of a PromptBuilder."""

    @property
    def columns_needed(self) -> tuple[str, ...] | None: ...

    def build_many(self, rows: list[SourceRow | Reject]) -> list[Prompt | Reject]: ...


class Windows(Protocol):
    """What is needed of a Ledger."""

    def window(self, shard: int, start: int) -> WindowOrder | None: ...

    def settle_window(self, planned: WindowOrder) -> WindowOrder: ...


class Assignment:
    """Half-open ranges of places of a shard of `num_rows` rows that are still to be run, in order.

    Known by itself, not by its values: the same places may be assigned again. Read in other threads than the
    one that withdraws.
    """

    def __init__(self, shard: Shard, num_rows: int, ranges: tuple[tuple[int, int], ...]):
        self.shard = shard
        self.num_rows = num_rows
        self.ranges = ranges
        self.settled_stop = 0
        """Places before this one are in windows whose order is on record."""
        self._withdrawn: tuple[tuple[int, int], ...] = ()

    def inside(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of the ranges that lie in [start, stop)."""
        cut = ((max(a, start), min(b, stop)) for a, b in self.ranges)
        return [(a, b) for a, b in cut if a < b]

    def withdraw(self, start: int, stop: int) -> None:
        """Another worker runs these places: those that are not read yet need not be."""
        self._withdrawn = (*self._withdrawn, (start, stop))

    def is_withdrawn(self, place: int) -> bool:
        return any(start <= place < stop for start, stop in self._withdrawn)


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row at its place in the shard's order; `window` is the settled one that the place is in."""

    row: Prompt | Reject
    place: int
    window: WindowOrder
    assignment: Assignment | None = None
    """What it was read for."""


@dataclass(frozen=True, slots=True)
class Portion:
    """Rows in running order. Portions are to be consumed one after the other, each once."""

    num_rows: int
    rows: Iterator[PlacedRow]


class PlannedReader:
    """Turns assignments into portions. `settings.order` says whether windows are planned at all.

    A portion may be consumed in another thread while the next one is made.
    """

    def __init__(
        self, builder: Builder, settings: InputSettings, windows: Windows, spool_dir: Path, chunk_rows: int
    ):
        self._builder = builder
        self._settings = settings
        self._windows = windows
        self._spool_dir = spool_dir
        # Windows end where a chunk ends, and not in the middle of a batch if that can be helped.
        self._step = chunk_rows * -(-BATCH_ROWS // chunk_rows)
        self._seen = SeenPrefixes()
        self._building = threading.Lock()

    def portions(self, assignment: Assignment, is_closed: Callable[[], bool]) -> Iterator[Portion]:
        """The assigned rows. Ends early, in the middle of a window, once `is_closed`.

        Raises InputError when the shard cannot be read or has fewer rows than it had.
        """
        if not assignment.ranges:
            return
        shard, num_rows = assignment.shard, assignment.num_rows
        source: Iterator[SourceRow | Reject] | None = None
        start, last = 0, assignment.ranges[-1][1]
        plans = self._settings.order == "prefix"
        while start < last and not is_closed():
            window = self._windows.window(shard.index, start)
            if window is None and plans:
                source = source or self._read(shard, start, num_rows)
                planned, spool, plans = self._plan(source, shard, start, num_rows, is_closed)
                if planned is None:
                    return
                window = self._windows.settle_window(planned)
                if window.sha256 == planned.sha256:
                    assignment.settled_stop = window.stop
                    yield self._spooled(
                        window, assignment, spool, lambda position, first=start: position - first
                    )
                    start = window.stop
                    continue
                spool.close()  # another worker's order counts, and may end elsewhere
                source = None
            elif window is None:
                rest = WindowOrder(shard=shard.index, start=start, stop=num_rows)
                window = self._windows.settle_window(rest)
            assignment.settled_stop = window.stop
            ranges = assignment.inside(window.start, window.stop)
            if ranges and window.planned is None:
                first = ranges[0][0]
                yield self._streamed(window, assignment, source or self._read(shard, first, num_rows))
                source = None  # the portion's from here on
            elif ranges:
                positions = [place for a, b in ranges for place in window.positions(a, b)]
                source = source or self._read(shard, min(positions), num_rows)
                spool = self._spool(source, frozenset(positions), shard, is_closed)
                if spool is None:
                    return
                numbers = {position: number for number, position in enumerate(sorted(positions))}
                yield self._spooled(window, assignment, spool, numbers.__getitem__)
            start = window.stop

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[SourceRow | Reject]:
        return read_rows(shard, self._settings, start, stop, self._builder.columns_needed)

    def _build(self, rows: list[SourceRow | Reject]) -> list[Prompt | Reject]:
        with self._building:  # a tokenizer serves one thread at a time
            return self._builder.build_many(rows)

    def _plan(
        self,
        source: Iterator[SourceRow | Reject],
        shard: Shard,
        start: int,
        num_rows: int,
        is_closed: Callable[[], bool],
    ) -> tuple[WindowOrder | None, PromptSpool, bool]:
        """Read and plan a window; None when closed. Last: whether to plan the next one too."""
        planner = WindowPlanner(shard.index, start, self._seen)
        spool = PromptSpool(self._spool_dir)
        while (num_left := num_rows - start - len(spool)) > 0:
            if is_closed():
                return None, spool, False
            size = min(BATCH_ROWS, num_left, self._step - len(spool) % self._step)
            batch = list(islice(source, size))
            if len(batch) < size:
                raise _too_short(shard)
            for row in self._build(batch):
                spool.add(row)
                planner.add(row)
            if len(spool) % self._step:
                continue
            if planner.is_full or spool.is_full:
                break
            is_early = len(spool) - self._step < prefix_plan.EARLY_ROWS <= len(spool)
            if is_early and not planner.is_worth_planning():
                return planner.plan(), spool, False
        return planner.plan(), spool, True

    def _spooled(
        self,
        window: WindowOrder,
        assignment: Assignment,
        spool: PromptSpool,
        number_of: Callable[[int], int],
    ) -> Portion:
        """Rows from a spool; `number_of` says where in it the row at a position is."""
        _ = window.groups  # found here, in this thread's time
        ranges = assignment.inside(window.start, window.stop)

        def rows() -> Iterator[PlacedRow]:
            for a, b in ranges:
                for place, position in zip(range(a, b), window.positions(a, b), strict=True):
                    if not assignment.is_withdrawn(place):
                        yield PlacedRow(spool.read(number_of(position)), place, window, assignment)
            spool.close()

        return Portion(_num_rows(ranges), rows())

    def _spool(
        self,
        source: Iterator[SourceRow | Reject],
        wanted: frozenset[int],
        shard: Shard,
        is_closed: Callable[[], bool],
    ) -> PromptSpool | None:
        """The wanted rows by position; None when closed."""
        spool = PromptSpool(self._spool_dir)
        last = max(wanted)
        # Up to the last wanted row and not one further: what follows is the next window's.
        batch: list[SourceRow | Reject] = []
        for row in source:
            if row.position in wanted:
                batch.append(row)
            if len(batch) == BATCH_ROWS or row.position == last:
                for built in self._build(batch):
                    spool.add(built)
                batch = []
            if row.position == last:
                break
            if is_closed():
                return None
        if len(spool) < len(wanted):
            raise _too_short(shard)
        return spool

    def _streamed(
        self, window: WindowOrder, assignment: Assignment, source: Iterator[SourceRow | Reject]
    ) -> Portion:
        """Rows in input order, where place and position are the same."""
        # One pass from the first wanted row to the last: beginning anew for each range would read a JSONL
        # file from its first line every time.
        ranges = assignment.inside(window.start, window.stop)
        last = ranges[-1][1]
        position = -1

        def wanted() -> Iterator[SourceRow | Reject]:
            nonlocal position
            for row in source:
                position = row.position
                is_wanted = any(a <= position < b for a, b in ranges)
                if is_wanted and not assignment.is_withdrawn(position):
                    yield row
                if position == last - 1:
                    return

        def rows() -> Iterator[PlacedRow]:
            following = wanted()
            while batch := list(islice(following, BATCH_ROWS)):
                for row in self._build(batch):
                    yield PlacedRow(row, row.position, window, assignment)
            if position < last - 1:
                raise _too_short(assignment.shard)

        return Portion(_num_rows(ranges), rows())


def _num_rows(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(b - a for a, b in ranges)


def _too_short(shard: Shard) -> InputError:
    return InputError(
        f"{shard.name}: fewer rows were read than it had when the run began; restore it or begin a new output"
    )
