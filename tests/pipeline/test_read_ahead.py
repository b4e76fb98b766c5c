"""Reading ahead: every wanted row once, in order, no more held than allowed, an end that always comes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.sampling_params import SamplingParams
from pipeline.read_ahead import Assignment, Item, ReadAhead, ReadFailure
from pipeline.rows import Prompt, Reject, SourceRow
from pipeline.shards import InputSettings, list_shards
from tests.pipeline.input_helpers import lines, write_jsonl


class CountingBuilder:
    """Ten tokens a prompt; remembers how many rows it was given."""

    columns_needed = ("prompt",)

    def __init__(self, error: Exception | None = None):
        self.num_built = 0
        self._error = error

    def build_many(self, rows: list[SourceRow | Reject]) -> list[Prompt | Reject]:
        if self._error is not None:
            raise self._error
        self.num_built += len(rows)
        return [
            Prompt(
                str(row.position), row.shard_index, row.position, (1,) * 10, "", SamplingParams(), {}, False
            )
            for row in rows
            if isinstance(row, SourceRow)
        ]


@pytest.fixture
def settings(tmp_path: Path) -> InputSettings:
    for shard in range(2):
        write_jsonl(tmp_path / f"{shard}.jsonl", lines([{"prompt": str(i)} for i in range(300)]))
    return InputSettings(path=str(tmp_path))


def take_all(reader: ReadAhead) -> list[Item]:
    items = []
    while not reader.is_exhausted:
        item = reader.take(timeout=5.0)
        if item is not None:
            items.append(item)
    return items


def test_assigned_ranges_come_in_order_across_shards(settings: InputSettings) -> None:
    first, second = list_shards(settings)
    with ReadAhead(CountingBuilder(), settings, max_rows=7) as reader:
        reader.assign(Assignment(first, ((3, 6), (200, 202))))
        reader.assign(Assignment(second, ((299, 300),)))
        places = [(item.shard_index, item.position) for item in take_all(reader) if isinstance(item, Prompt)]
    assert places == [(0, 3), (0, 4), (0, 5), (0, 200), (0, 201), (1, 299)]


@pytest.mark.parametrize(("limits", "most"), [({"max_rows": 5}, 5), ({"max_tokens": 35}, 3)])
def test_no_more_is_held_than_allowed(settings: InputSettings, limits: dict[str, int], most: int) -> None:
    builder = CountingBuilder()
    with ReadAhead(builder, settings, **limits) as reader:
        reader.assign(Assignment(list_shards(settings)[0], ((0, 300),)))
        deadline = time.monotonic() + 5
        while builder.num_built == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(reader._items) == most
        assert builder.num_built == 64  # one batch, not the whole shard
        assert len(take_all(reader)) == 300


def test_a_prompt_larger_than_the_limit_still_comes(settings: InputSettings) -> None:
    with ReadAhead(CountingBuilder(), settings, max_tokens=1) as reader:
        reader.assign(Assignment(list_shards(settings)[0], ((0, 3),)))
        assert len(take_all(reader)) == 3


@pytest.mark.parametrize("error", [InputError("damaged"), ZeroDivisionError("a bug")])
def test_an_error_is_handed_over_and_later_shards_are_read(settings: InputSettings, error: Exception) -> None:
    first, second = list_shards(settings)
    builder = CountingBuilder(error)
    with ReadAhead(builder, settings) as reader:
        reader.assign(Assignment(first, ((0, 300),)))
        failure = reader.take(timeout=5.0)
        assert isinstance(failure, ReadFailure)
        assert (failure.shard_index, failure.error) == (0, error)
        builder._error = None
        reader.assign(Assignment(second, ((0, 2),)))
        assert len(take_all(reader)) == 2


def test_leaving_ends_the_thread_though_its_buffer_is_full(settings: InputSettings) -> None:
    before = threading.active_count()
    with ReadAhead(CountingBuilder(), settings, max_rows=1) as reader:
        reader.assign(Assignment(list_shards(settings)[0], ((0, 300),)))
        assert isinstance(reader.take(timeout=5.0), Prompt)
    assert threading.active_count() == before
    assert reader.take() is None
