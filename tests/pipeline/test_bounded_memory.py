"""However large a shard is, a worker holds no more of it at once: every queue has a bound, and memory too."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pipeline import prefix_plan
from pipeline.exit_codes import ExitCode
from pipeline.read_ahead import ReadAhead
from pipeline.worker import Worker
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.job_helpers import job_settings, run_fake, write_shards

MAX_NUM_SEQS = 16
CHUNK_ROWS = 64
BUFFERED_ROWS = 1024
SMALL, LARGE = 1100, 3300


class Held:
    """The most that was held at once, by what holds it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.most: dict[str, int] = defaultdict(int)
        self.peak_bytes = 0
        self._reader: Any = None
        self._worker: Any = None

        def keep_reader(*args: Any, **options: Any) -> ReadAhead:
            self._reader = ReadAhead(*args, **options)
            return self._reader

        def keep_worker(*args: Any, **options: Any) -> Worker:
            self._worker = Worker(*args, **options)
            return self._worker

        monkeypatch.setattr("pipeline.run.ReadAhead", keep_reader)
        monkeypatch.setattr("pipeline.run.Worker", keep_worker)

    def fill(self) -> None:
        """Let the reader put all it may into its queues, as when the engine is slow."""
        before, deadline = -1, time.monotonic() + 10
        while len(self._reader._items) != before and time.monotonic() < deadline:
            before = len(self._reader._items)
            time.sleep(0.1)

    def look(self, engine: FakeEngine) -> None:
        work = self._worker._work
        for name, number in {
            "rows read ahead": len(self._reader._items),
            "portions planned ahead": len(self._reader._planned),
            "rows in the engine": engine.num_unfinished,
            "rows in flight": sum(len(shard.in_flight) for shard in work.shards.values()),
            "chunks open": len(work.chunks),
            "rows in the writers": sum(chunk.num_done for chunk in work.chunks.values()),
        }.items():
            self.most[name] = max(self.most[name], number)


class Watched(FakeEngine):
    """Begins once the queues before it are full, and looks at all of them after each step."""

    def __init__(self, held: Held):
        super().__init__(max_num_seqs=MAX_NUM_SEQS)
        self._held = held

    def step(self) -> list[Any]:
        if self._num_steps == 0:
            self._held.fill()
        outputs = super().step()
        self._held.look(self)
        return outputs


def run(
    folder: Path, num_rows: int, order: str, monkeypatch: pytest.MonkeyPatch, traces: bool = False
) -> Held:
    shards = write_shards(folder / "in", num_shards=1, rows_per_shard=num_rows)
    settings = job_settings(
        shards,
        folder / "out",
        input__order=order,
        output__chunk_rows=CHUNK_ROWS,
        sampling__max_tokens=3,
        engine__max_num_seqs=MAX_NUM_SEQS,
    )
    held = Held(monkeypatch)
    gc.collect()
    if traces:
        tracemalloc.start()
    try:
        assert run_fake(settings, lambda *_: Watched(held)) is ExitCode.DONE
        held.peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return held


@pytest.mark.parametrize("order", ["input", "prefix"])
def test_no_queue_grows_with_the_shard(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_plan, "MAX_WINDOW_ROWS", 512)
    most = run(tmp_path, LARGE, order, monkeypatch).most
    print(order, dict(most))
    assert most["rows read ahead"] == BUFFERED_ROWS, "it was filled"
    assert most["portions planned ahead"] <= 1
    assert most["rows in the engine"] <= most["rows in flight"] == 2 * MAX_NUM_SEQS
    # Each open chunk has a row in the engine, but for the one whose rows are coming.
    assert most["chunks open"] <= 2 * MAX_NUM_SEQS + 1
    assert most["rows in the writers"] <= (2 * MAX_NUM_SEQS + 1) * CHUNK_ROWS


def test_a_shard_three_times_as_large_takes_no_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_plan, "MAX_WINDOW_ROWS", 512)
    run(tmp_path / "warm", 200, "prefix", monkeypatch)
    small = run(tmp_path / "small", SMALL, "prefix", monkeypatch, traces=True)
    large = run(tmp_path / "large", LARGE, "prefix", monkeypatch, traces=True)
    print(f"{small.peak_bytes:,} and {large.peak_bytes:,} bytes")
    assert large.peak_bytes < 1.25 * small.peak_bytes
