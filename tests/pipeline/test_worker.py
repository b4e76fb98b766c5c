"""The worker keeps the engine full, commits chunks in any order, and survives rows that kill it."""

from __future__ import annotations

import dataclasses
import json
import uuid
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.exit_codes import ExitCode
from pipeline.ledger import Ledger
from pipeline.open_work import merge_ranges
from pipeline.plan import RunPlan
from pipeline.results import open_run
from pipeline.run import run_job
from pipeline.settings import Settings
from pipeline.signals import StopRequest
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import (
    commits,
    fake_engine,
    fake_model,
    job_settings,
    run_fake,
    write_shards,
)


class Crash(BaseException):
    """Ends a run where it stands; nothing in the pipeline catches it."""


def crash(request_id: str = "") -> None:
    raise Crash(request_id)


class WatchedEngine(FakeEngine):
    """Remembers how many sequences each step ran and which requests were in flight together."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.widths: list[int] = []
        self.companies: list[frozenset[str]] = []

    def step(self) -> list[Any]:
        self.companies.append(frozenset(each.request_id for each in self._waiting + self._running))
        self.widths.append(min(len(self.companies[-1]), self.max_num_seqs))
        return super().step()


def test_the_engine_is_full_until_the_last_rows_whatever_the_chunks(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in", num_shards=3, rows_per_shard=16)
    settings = job_settings(
        folder, tmp_path / "out", output__chunk_rows=2, sampling__max_tokens=5, sampling__ignore_eos=True
    )
    engine = WatchedEngine(max_num_seqs=4)
    assert run_fake(settings, lambda *_: engine) == ExitCode.DONE
    # 48 rows of 5 steps each, 4 at a time: not one step more than a single endless batch would take.
    assert engine.widths == [4] * (48 * 5 // 4)


def test_a_chunk_commits_when_its_rows_are_done_in_any_order(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "p", "sampling": {"max_tokens": 100 if i == 0 else 2}} for i in range(9)]
    write_jsonl(tmp_path / "in" / "a.jsonl", lines(rows))
    settings = job_settings(
        tmp_path / "in", tmp_path / "out", prompt__sampling_column="sampling", sampling__ignore_eos=True
    )
    with pytest.raises(Crash):
        run_fake(
            settings, lambda *_: FakeEngine(max_num_seqs=4, crash_on={"0:0"}, crash_at_step=50, crash=crash)
        )
    assert sorted(commits(tmp_path / "out")) == ["00000/00001", "00000/00002"]


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_row_that_kills_its_process_is_found_and_left_out(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also in a bucket, where fewer heartbeats are written."""
    folder = write_shards(tmp_path / "in", num_shards=2, rows_per_shard=9)
    output = str(tmp_path / "out")
    if place == "s3":
        output = f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    settings = job_settings(folder, output)
    engines: list[WatchedEngine] = []

    def deadly(_: Any, settings: Settings) -> FakeEngine:
        engines.append(WatchedEngine(max_num_seqs=4, crash_on={"0:4"}, crash_at_step=2, crash=crash))
        return engines[-1]

    for _start in range(12):
        try:
            code = run_fake(settings, deadly)
            break
        except Crash:
            continue
    else:
        pytest.fail("the run never got past the row that kills it")
    assert code == ExitCode.DONE
    assert len(engines) <= 6
    [reject] = open_run(output).rejects()
    assert (reject["row_id"], reject["reason"]) == ("0-4", "quarantined")
    ids = [row["row_id"] for row in open_run(output).rows(["row_id"])]
    assert ids == [f"{s}-{i}" for s in range(2) for i in range(9) if (s, i) != (0, 4)]
    # What was in flight in both of the first deaths ran alone after them, then only the culprit did.
    suspects = engines[0].companies[-1] & engines[1].companies[-1]
    assert all(len(company) == 1 for company in engines[2].companies if company & suspects)
    for engine in engines[3:]:
        assert all(len(company) == 1 for company in engine.companies if "0:4" in company)
    assert any(len(company) > 1 for company in engines[-1].companies)


def test_a_row_the_engine_refuses_is_a_reject(tmp_path: Path) -> None:
    rows = [{"id": "short", "prompt": "p"}, {"id": "long", "prompt": "x y " * 20}]
    write_jsonl(tmp_path / "in" / "a.jsonl", lines(rows))
    settings = job_settings(tmp_path / "in", tmp_path / "out", max_reject_fraction=0.5)
    assert run_fake(settings, lambda *_: FakeEngine(max_num_seqs=4, max_model_len=10)) == ExitCode.DONE
    [reject] = (tmp_path / "out" / "rejects" / "part-00000-of-00001.jsonl").read_text().splitlines()
    assert (json.loads(reject)["row_id"], json.loads(reject)["reason"]) == ("long", "prompt_too_long")


def test_a_stop_before_the_work_begins_starts_no_engine(tmp_path: Path) -> None:
    stop = StopRequest(5.0)
    stop.ask("SIGTERM")

    def no_engine(loaded: Any, settings: Settings) -> FakeEngine:
        raise AssertionError("the engine was started to stop at once")

    settings = job_settings(write_shards(tmp_path / "in"), tmp_path / "out")
    assert run_fake(settings, no_engine, stop) == ExitCode.DRAINED


def test_a_drain_takes_no_new_rows_and_finishes_open_chunks(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in", num_shards=1, rows_per_shard=30)
    settings = job_settings(
        folder,
        tmp_path / "out",
        input__order="input",
        output__chunk_rows=4,
        sampling__max_tokens=6,
        sampling__ignore_eos=True,
    )
    stop = StopRequest(30.0)
    engine = WatchedEngine(
        max_num_seqs=4, crash_on={"0:8"}, crash_at_step=1, crash=lambda _: stop.ask("SIGTERM")
    )
    assert run_fake(settings, lambda *_: engine, stop) == ExitCode.DRAINED
    # When it was asked, rows 8 to 11 ran and 12 to 15 waited: both chunks were whole, none after was begun.
    assert sorted(commits(tmp_path / "out")) == [f"00000/{chunk:05d}" for chunk in range(4)]
    assert frozenset().union(*engine.companies) == {f"0:{row}" for row in range(16)}


def test_a_drain_gives_up_rows_of_chunks_that_cannot_complete(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in", num_shards=1, rows_per_shard=30)
    settings = job_settings(
        folder,
        tmp_path / "out",
        input__order="input",
        output__chunk_rows=5,
        sampling__max_tokens=6,
        sampling__ignore_eos=True,
    )
    stop = StopRequest(30.0)
    engine = WatchedEngine(
        max_num_seqs=4, crash_on={"0:8"}, crash_at_step=1, crash=lambda _: stop.ask("SIGTERM")
    )
    assert run_fake(settings, lambda *_: engine, stop) == ExitCode.DRAINED
    # Row 15 had been handed over, the other rows of its chunk had not been read.
    assert sorted(commits(tmp_path / "out")) == [f"00000/{chunk:05d}" for chunk in range(3)]
    assert "0:15" in frozenset().union(*engine.companies)
    assert "0:15" not in engine.companies[-1]


def test_a_shard_with_fewer_rows_than_planned_ends_as_an_error(tmp_path: Path, capsys: Any) -> None:
    settings = job_settings(write_shards(tmp_path / "in"), tmp_path / "out")

    def open_ledger(*args: Any, make_plan: Any, **options: Any) -> Ledger:
        def longer() -> RunPlan:
            plan = make_plan()
            first, *others = plan.shards
            return dataclasses.replace(plan, shards=(dataclasses.replace(first, num_rows=10), *others))

        return Ledger.open(*args, make_plan=longer, **options)

    run = partial(run_job, load_model=fake_model, make_engine=fake_engine, open_ledger=open_ledger)
    assert run(settings) == ExitCode.BAD_CONFIG
    assert "0.jsonl: fewer rows were read" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "out" / "data").iterdir()) == [
        "part-00001-of-00003.parquet",
        "part-00002-of-00003.parquet",
    ]


@given(st.sets(st.integers(0, 30)), st.integers(1, 5))
def test_merged_ranges_hold_the_same_rows_with_a_gap_between_any_two(chunks: set[int], size: int) -> None:
    ranges = [(chunk * size, (chunk + 1) * size) for chunk in sorted(chunks)]
    merged = merge_ranges(ranges)
    assert {row for a, b in merged for row in range(a, b)} == {row for a, b in ranges for row in range(a, b)}
    assert all(before[1] < after[0] for before, after in pairwise(merged))
