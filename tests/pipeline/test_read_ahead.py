"""Reading ahead: every wanted row once, in the settled order, no more held than allowed, an end that always
comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import InputError
from engine.sampling_params import SamplingParams
from pipeline import prefix_plan, prompt_spool
from pipeline.planned_reading import Assignment, PlacedRow, PlannedReader
from pipeline.read_ahead import Item, ReadAhead, ReadFailure
from pipeline.row_order import PlannedOrder, WindowOrder
from pipeline.rows import Prompt, Reject, SourceRow
from pipeline.shards import InputSettings, Shard, list_shards
from tests.pipeline.input_helpers import lines, write_jsonl


class CountingBuilder:
    """Ten tokens a prompt; remembers how many rows it was given."""

    columns_needed = ("prompt",)

    def __init__(self, error: Exception | None = None, token: Callable[[int], int] = lambda position: 1):
        self.num_built = 0
        self._error = error
        self._token = token

    def build_many(self, rows: list[SourceRow | Reject]) -> list[Prompt | Reject]:
        if self._error is not None:
            raise self._error
        self.num_built += len(rows)
        sampling = SamplingParams()
        return [
            Prompt(
                str(row.position),
                row.shard_index,
                row.position,
                (self._token(row.position),) * 10,
                "",
                sampling,
                {},
                False,
            )
            for row in rows
            if isinstance(row, SourceRow)
        ]


class Book:
    """The windows that were settled, by shard and start."""

    def __init__(self) -> None:
        self.windows: dict[tuple[int, int], WindowOrder] = {}

    def window(self, shard: int, start: int) -> WindowOrder | None:
        return self.windows.get((shard, start))

    def settle_window(self, planned: WindowOrder) -> WindowOrder:
        return self.windows.setdefault((planned.shard, planned.start), planned)


@pytest.fixture
def settings(tmp_path: Path) -> InputSettings:
    for shard in range(2):
        write_jsonl(tmp_path / "in" / f"{shard}.jsonl", lines([{"prompt": str(i)} for i in range(300)]))
    return InputSettings(path=str(tmp_path / "in"))


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def in_order(settings: InputSettings, order: str = "input") -> Any:
    return InputSettings(path=settings.path, order=order)  # pyright: ignore[reportArgumentType]


def reader_of(
    builder: Any, settings: InputSettings, spool: Path, book: Book | None = None, **limits: Any
) -> ReadAhead:
    return ReadAhead(PlannedReader(builder, settings, book or Book(), spool, chunk_rows=10), **limits)


def all_of(shard: Shard, *ranges: tuple[int, int]) -> Assignment:
    return Assignment(shard, 300, ranges or ((0, 300),))


def take_all(reader: ReadAhead) -> list[Item]:
    items = []
    while not reader.is_exhausted:
        item = reader.take(timeout=5.0)
        if item is not None:
            items.append(item)
    return items


def positions(items: Sequence[Item]) -> list[int]:
    return [item.row.position for item in items if isinstance(item, PlacedRow)]


@pytest.mark.parametrize("order", ["input", "prefix"])
def test_assigned_ranges_come_in_order_across_shards(
    settings: InputSettings, spool: Path, order: str
) -> None:
    first, second = list_shards(settings)
    with reader_of(CountingBuilder(), in_order(settings, order), spool, max_rows=7) as reader:
        reader.assign(all_of(first, (3, 6), (200, 202)))
        reader.assign(all_of(second, (299, 300)))
        items = take_all(reader)
    # Ten equal tokens each: duplicates, which keep their order.
    places = [(item.row.shard_index, item.place) for item in items if isinstance(item, PlacedRow)]
    assert places == [(0, 3), (0, 4), (0, 5), (0, 200), (0, 201), (1, 299)]
    assert positions(items) == [3, 4, 5, 200, 201, 299]


def test_rows_come_in_the_planned_order_read_and_tokenised_once(settings: InputSettings, spool: Path) -> None:
    builder, book = CountingBuilder(token=lambda position: position % 3), Book()
    with reader_of(builder, settings, spool, book) as reader:
        reader.assign(all_of(list_shards(settings)[0]))
        items = take_all(reader)
    assert positions(items) == [position for rest in range(3) for position in range(rest, 300, 3)]
    assert builder.num_built == 300
    assert list(book.windows) == [(0, 0)]


@pytest.mark.parametrize("order", ["input", "prefix"])
def test_a_later_start_goes_by_what_is_recorded(settings: InputSettings, spool: Path, order: str) -> None:
    """Whatever its own settings say: only the missing rows, at the places they were given."""
    book = Book()
    backwards = PlannedOrder(
        offsets=np.arange(100)[::-1], prefix_lens=np.zeros(100), achievable=np.zeros(100)
    )
    book.settle_window(WindowOrder(shard=0, start=0, stop=100, planned=backwards))
    book.settle_window(WindowOrder(shard=0, start=100, stop=300))
    builder = CountingBuilder()
    with reader_of(builder, in_order(settings, order), spool, book) as reader:
        reader.assign(all_of(list_shards(settings)[0], (10, 20), (90, 110)))
        items = take_all(reader)
    assert positions(items) == [*range(89, 79, -1), *range(9, -1, -1), *range(100, 110)]
    assert [item.place for item in items if isinstance(item, PlacedRow)] == [*range(10, 20), *range(90, 110)]
    assert builder.num_built == 30


def test_another_workers_order_counts_if_it_was_there_first(settings: InputSettings, spool: Path) -> None:
    theirs = WindowOrder(shard=0, start=0, stop=300)

    class Late(Book):
        def window(self, shard: int, start: int) -> WindowOrder | None:
            return None

        def settle_window(self, planned: WindowOrder) -> WindowOrder:
            return theirs

    builder = CountingBuilder(token=lambda position: position % 3)
    with reader_of(builder, settings, spool, Late()) as reader:
        reader.assign(all_of(list_shards(settings)[0]))
        assert positions(take_all(reader)) == list(range(300))


def test_windows_end_at_chunks_and_follow_each_other(
    settings: InputSettings, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_plan, "MAX_WINDOW_ROWS", 100)
    book = Book()
    with reader_of(CountingBuilder(), settings, spool, book) as reader:
        reader.assign(all_of(list_shards(settings)[0]))
        assert positions(take_all(reader)) == list(range(300))
    assert [(window.start, window.stop) for window in book.windows.values()] == [
        (0, 140),
        (140, 280),
        (280, 300),
    ]


def test_so_many_tokens_end_a_window(
    settings: InputSettings, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_plan, "MAX_WINDOW_TOKENS", 1000)
    book = Book()
    with reader_of(CountingBuilder(), settings, spool, book) as reader:
        reader.assign(all_of(list_shards(settings)[0]))
        assert positions(take_all(reader)) == list(range(300))
    assert [window.stop for window in book.windows.values()] == [140, 280, 300]


def test_a_full_spool_ends_a_window(
    settings: InputSettings, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_spool, "MAX_BYTES", 1000)
    monkeypatch.setattr(prompt_spool, "MEMORY_BYTES", 100)  # so that it is on the disk
    book = Book()
    with reader_of(CountingBuilder(), settings, spool, book) as reader:
        reader.assign(all_of(list_shards(settings)[0]))
        assert positions(take_all(reader)) == list(range(300))
    assert [window.stop for window in book.windows.values()] == [70, 140, 210, 280, 300]
    assert not list(spool.iterdir())


def test_rows_with_nothing_in_common_are_not_held_back(
    settings: InputSettings, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_plan, "EARLY_ROWS", 100)
    book, builder = Book(), CountingBuilder(token=lambda position: position)
    with reader_of(builder, settings, spool, book, max_rows=5) as reader:
        reader.assign(all_of(list_shards(settings)[0]))
        assert isinstance(reader.take(timeout=5.0), PlacedRow)
        time.sleep(0.1)
        assert builder.num_built < 300, "the rest is read as it is needed"
        take_all(reader)
    assert [(window.stop, window.planned is None) for window in book.windows.values()] == [
        (140, False),
        (300, True),
    ]
    assert builder.num_built == 300


@pytest.mark.parametrize(("limits", "most"), [({"max_rows": 5}, 5), ({"max_tokens": 35}, 3)])
@pytest.mark.parametrize(("order", "built"), [("input", 64), ("prefix", 300)])
def test_no_more_is_held_than_allowed(
    settings: InputSettings, spool: Path, limits: dict[str, Any], most: int, order: str, built: int
) -> None:
    builder = CountingBuilder()
    with reader_of(builder, in_order(settings, order), spool, **limits) as reader:
        reader.assign(all_of(list_shards(settings)[0]))
        deadline = time.monotonic() + 5
        while len(reader._items) < most and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(reader._items) == most
        assert builder.num_built == built  # one batch, or the window that must be known to be ordered
        assert not reader.wants_assignment
        assert len(take_all(reader)) == 300
        assert reader.wants_assignment


def test_a_prompt_larger_than_the_limit_still_comes(settings: InputSettings, spool: Path) -> None:
    with reader_of(CountingBuilder(), settings, spool, max_tokens=1) as reader:
        reader.assign(Assignment(list_shards(settings)[0], 3, ((0, 3),)))
        assert len(take_all(reader)) == 3


@pytest.mark.parametrize("order", ["input", "prefix"])
@pytest.mark.parametrize("error", [InputError("damaged"), ZeroDivisionError("a bug")])
def test_an_error_is_handed_over_and_later_shards_are_read(
    settings: InputSettings, spool: Path, error: Exception, order: str
) -> None:
    first, second = list_shards(settings)
    builder = CountingBuilder(error)
    with reader_of(builder, in_order(settings, order), spool) as reader:
        reader.assign(all_of(first))
        failure = reader.take(timeout=5.0)
        assert isinstance(failure, ReadFailure)
        assert (failure.shard_index, failure.error) == (0, error)
        builder._error = None
        reader.assign(Assignment(second, 2, ((0, 2),)))
        assert len(take_all(reader)) == 2


@pytest.mark.parametrize("order", ["input", "prefix"])
def test_a_shard_with_fewer_rows_than_it_had_is_an_error(
    settings: InputSettings, spool: Path, order: str
) -> None:
    book = Book()
    for _ in range(2):  # planned anew, and by a record
        with reader_of(CountingBuilder(), in_order(settings, order), spool, book) as reader:
            reader.assign(Assignment(list_shards(settings)[0], 301, ((0, 301),)))
            failure = take_all(reader)[-1]
        assert isinstance(failure, ReadFailure)
        assert isinstance(failure.error, InputError)
        assert "0.jsonl: fewer rows were read" in str(failure.error)
        offsets = np.arange(301)
        book.settle_window(
            WindowOrder(
                shard=0,
                start=0,
                stop=301,
                planned=PlannedOrder(offsets=offsets, prefix_lens=offsets * 0, achievable=offsets * 0),
            )
        )


@pytest.mark.parametrize("order", ["input", "prefix"])
def test_leaving_ends_the_threads_though_the_buffer_is_full(
    settings: InputSettings, spool: Path, order: str
) -> None:
    before = threading.active_count()
    with reader_of(CountingBuilder(), in_order(settings, order), spool, max_rows=1) as reader:
        reader.assign(all_of(list_shards(settings)[0]))
        assert isinstance(reader.take(timeout=5.0), PlacedRow)
    assert threading.active_count() == before
    assert reader.take() is None


def test_no_more_than_one_shard_waits_however_small_they_are(tmp_path: Path, spool: Path) -> None:
    for shard in range(3):
        write_jsonl(tmp_path / "in" / f"{shard}.jsonl", lines([{"prompt": f"{shard}"}] * 2))
    settings = InputSettings(path=str(tmp_path / "in"))
    first, second, third = (Assignment(shard, 2, ((0, 2),)) for shard in list_shards(settings))
    with reader_of(CountingBuilder(), settings, spool) as reader:
        assert reader.wants_assignment
        reader.assign(first)
        taken = [reader.take(timeout=5), reader.take(timeout=5)]
        assert comes_to_want(reader), "the first is begun"
        reader.assign(second)
        while len(reader._items) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        assert not reader.wants_assignment, "the second waits"
        taken.append(reader.take(timeout=5))
        assert comes_to_want(reader), "the second is begun"
        reader.assign(third)
        assert len(taken + take_all(reader)) == 6


def comes_to_want(reader: ReadAhead) -> bool:
    """Whether it wants another assignment, once its threads have seen that they have nothing to do."""
    deadline = time.monotonic() + 5
    while not reader.wants_assignment and time.monotonic() < deadline:
        time.sleep(0.01)
    return reader.wants_assignment
