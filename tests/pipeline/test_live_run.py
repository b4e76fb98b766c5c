"""Watching a run: what is seen adds up to what the run counts, and a look costs what there is to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.exit_codes import ExitCode
from pipeline.live_run import LiveRun
from pipeline.results import open_run
from pipeline.settings import Settings
from pipeline.storage import open_storage
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import fake_engine, job_settings, run_fake, write_shards


class Listed:
    """Counts what is asked of a storage."""

    def __init__(self, inner: Any):
        self._inner = inner
        self.lists: list[str] = []
        self.reads: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def list(self, folder: str) -> list[str]:
        self.lists.append(folder)
        return self._inner.list(folder)

    def read(self, path: str) -> bytes | None:
        self.reads.append(path)
        return self._inner.read(path)


def test_looks_during_a_run_add_up_to_its_counts(tmp_path: Path):
    folder = write_shards(tmp_path / "in", num_shards=3, rows_per_shard=12)
    same = [{"id": f"3-{i}", "prompt": f"again {i % 2}"} for i in range(6)]
    write_jsonl(folder / "3.jsonl", lines(same) + b"not json\n")
    settings = job_settings(folder, tmp_path / "out", sampling__temperature=0.0)
    seen: list[LiveRun] = []
    rows: list[int] = []

    def watched(loaded: Any, settings: Settings) -> FakeEngine:
        engine = fake_engine(loaded, settings)
        step = engine.step

        def step_and_look() -> Any:
            if not seen and (tmp_path / "out" / "job.json").exists():
                run = open_run(tmp_path / "out")
                live = LiveRun.open(Listed(open_storage(run.path)), run.job["fingerprint"])  # type: ignore[arg-type]
                seen.extend([live] if live is not None else [])
            elif seen:
                seen[0].look()
                rows.append(seen[0].standing().rows_done)
            return step()

        engine.step = step_and_look
        return engine

    assert run_fake(settings, watched) is ExitCode.DONE
    (live,) = seen
    live.look()
    counts = open_run(tmp_path / "out").counts()
    assert rows == sorted(rows)
    assert 0 < rows[len(rows) // 2] < 43, "nothing was seen while it ran"
    assert (
        (live.overall.rows_in, live.overall.rows_rejected) == (counts["rows"], counts["rejected"]) == (43, 1)
    )
    assert live.overall.generated_tokens == counts["generated_tokens"]
    outcome = live.outcome(2.0)
    assert outcome.duplicates == counts["duplicates"] == 4
    assert outcome.is_finished
    storage: Any = live.storage
    read = [path for path in storage.reads if "/commits/" in path]
    assert len(read) == len(set(read)) == 15, "a commit was read twice"
    storage.lists.clear()
    live.look()
    assert [path.rpartition("/")[2] for path in storage.lists] == ["claims"], (
        "whole shards are looked at again"
    )


def test_a_watcher_that_comes_late_counts_from_then_on(tmp_path: Path):
    settings = job_settings(write_shards(tmp_path / "in"), tmp_path / "out")
    assert run_fake(settings) is ExitCode.DONE
    run = open_run(tmp_path / "out")
    live = LiveRun.open(open_storage(run.path), run.job["fingerprint"])
    assert live is not None
    standing = live.standing()
    assert (standing.rows_done, standing.rows_total) == (24, 24)
    assert standing.generated_tokens == 0
    assert live.overall.generated_tokens == run.counts()["generated_tokens"] > 0


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_without_a_plan_is_not_watched_yet(tmp_path: Path, begun: bool):
    if begun:
        (tmp_path / "_state" / "0").mkdir(parents=True)
    assert LiveRun.open(open_storage(str(tmp_path)), "0") is None
