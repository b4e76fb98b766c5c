"""The order that rows run in shows in no result: whatever the order, after a crash, with two workers."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.errors import OutputError
from pipeline import prefix_plan
from pipeline.exit_codes import ExitCode
from pipeline.local_storage import LocalStorage
from pipeline.results import open_run
from pipeline.row_order import WindowOrder
from pipeline.run import run_job
from pipeline.settings import Settings
from pipeline.signals import StopRequest
from pipeline.storage import Storage
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl, write_parquet
from tests.pipeline.job_helpers import commits, fake_engine, fake_model, final_bytes, job_settings, run_fake
from tests.pipeline.small_run import Crash, FaultyStorage

TEMPLATES = ["classify what follows, in one word: ", "translate to French, with care: ", "x "]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("pipeline.commits._FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("pipeline.sharing.HELD_POLL_SECONDS", 0.01)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards whose templates alternate, with bad rows and duplicates between."""

    def rows(shard: int, num_rows: int) -> list[dict[str, Any]]:
        found = []
        for i in range(num_rows):
            prompt: Any = TEMPLATES[i % 3] + "abc"[i % 2] * (i % 5)
            found.append({"id": f"{shard}-{i}", "prompt": 5 if i % 11 == 7 else prompt})
        return found

    write_jsonl(tmp_path / "in" / "0.jsonl", lines(rows(0, 29)) + b"{\n")
    write_parquet(
        tmp_path / "in" / "1.parquet",
        [{**row, "prompt": str(row["prompt"])} for row in rows(1, 17)],
    )
    return tmp_path / "in"


def settings_of(shards: Path, output: Path, **overrides: Any) -> Settings:
    options = {"max_reject_fraction": 0.5, "sampling__temperature": 1.0, "output__chunk_rows": 4}
    return job_settings(shards, output, **(options | overrides))


def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_plan, "MAX_WINDOW_ROWS", 12)
    monkeypatch.setattr("pipeline.planned_reading.BATCH_ROWS", 4)


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_the_order_changes_no_byte(
    shards: Path, tmp_path: Path, output_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for name, overrides in (
        ("input", {"input__order": "input"}),
        ("prefix", {}),
        ("windows", {}),
        ("spooled", {}),
    ):
        if name == "windows":
            small_windows(monkeypatch)
        if name == "spooled":  # every row of the shard is sorted through files
            monkeypatch.setattr("pipeline.chunk_merge.SORTED_BYTES", 200)
        settings = settings_of(shards, tmp_path / name, output__format=output_format, **overrides)
        assert run_fake(settings) == ExitCode.DONE
        made[name] = final_bytes(tmp_path / name)
        rows = [row["row_id"] for row in open_run(tmp_path / name).rows()]
        assert rows == sorted(rows, key=lambda each: tuple(map(int, each.split("-"))))
        assert len(list(open_run(tmp_path / name).trace())) == len(rows)
    assert made["input"] == made["prefix"] == made["windows"] == made["spooled"]
    assert len(made["input"]) == 3
    orders = sorted(path.name for path in (tmp_path / "windows").glob("_state/*/orders/00000/*"))
    assert [int(name.partition(".")[0]) for name in orders] == [0, 12, 24]


def test_templates_run_together_and_the_metrics_say_what_could_be_saved(shards: Path, tmp_path: Path) -> None:
    added: list[str] = []

    class Recording(FakeEngine):
        def add_request(self, request_id: str, *args: Any, **options: Any) -> None:
            added.append(request_id)
            super().add_request(request_id, *args, **options)

    engine = Recording(max_num_seqs=4)
    assert run_fake(settings_of(shards, tmp_path / "out"), lambda *_: engine) == ExitCode.DONE
    metrics = json.loads((tmp_path / "out/metrics/part-00000-of-00002.json").read_bytes())
    assert all(each["rows"] >= 8 and each["num_tokens"] >= 24 for each in metrics["templates"])
    assert {each["text"][:9] for each in metrics["templates"]} == {"classify ", "translate"}
    assert metrics["achievable_tokens"] >= sum(each["achievable_tokens"] for each in metrics["templates"]) > 0
    assert metrics["achieved_share"] == 0.0  # the engine of this test has no cache
    assert metrics["tail_seconds"] >= 0.0
    assert metrics["padding_share"] is not None
    templates = [int(request_id[2:]) % 3 for request_id in added if request_id.startswith("0:")]
    changes = sum(a != b for a, b in pairwise(templates))
    assert changes == 2, "each template's rows arrive in one go"


def test_a_run_in_progress_shows_rows_in_input_order(shards: Path, tmp_path: Path) -> None:
    settings = settings_of(shards, tmp_path / "out")
    with pytest.raises(Crash):
        run_fake(settings, lambda *_: FakeEngine(max_num_seqs=4, crash_on={"0:20"}, crash=crash))
    run = open_run(tmp_path / "out")
    rows = [row["row_id"] for row in run.rows(["row_id"])]
    assert 0 < len(rows) < 42
    assert rows == sorted(rows, key=lambda each: tuple(map(int, each.split("-"))))
    positions = [reject["position"] for reject in run.rejects()]
    assert positions == sorted(positions)


@pytest.mark.parametrize(("first", "then"), [("prefix", "input"), ("input", "prefix"), ("prefix", "prefix")])
def test_a_resumed_run_goes_on_in_the_order_it_was_begun_in(
    shards: Path, tmp_path: Path, first: str, then: str
) -> None:
    assert run_fake(settings_of(shards, tmp_path / "whole")) == ExitCode.DONE
    settings = settings_of(shards, tmp_path / "out", input__order=first)
    with pytest.raises(Crash):
        run_fake(settings, lambda *_: FakeEngine(max_num_seqs=4, crash_on={"0:20"}, crash=crash))
    kept = commits(tmp_path / "out")
    assert 0 < len(kept) < 13
    assert run_fake(settings_of(shards, tmp_path / "out", input__order=then)) == ExitCode.DONE
    assert kept.items() <= commits(tmp_path / "out").items()
    assert final_bytes(tmp_path / "out") == final_bytes(tmp_path / "whole")


def test_a_crash_at_any_operation_of_the_storage_changes_no_byte(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_windows(monkeypatch)
    (shards / "1.parquet").unlink()
    assert run_fake(settings_of(shards, tmp_path / "whole")) == ExitCode.DONE
    counted = FaultyStorage(LocalStorage(tmp_path / "counted"))
    assert run_on(counted, settings_of(shards, tmp_path / "counted"), monkeypatch) == ExitCode.DONE
    # Some of them: every single one is failed in test_ledger.py, with one thread and so in one order.
    for number in range(0, counted.num_operations, 9):
        output = tmp_path / f"out-{number}"
        faulty = FaultyStorage(LocalStorage(output), number, ["crash before", "crash after"][number % 2])
        with suppress(Crash):
            run_on(faulty, settings_of(shards, output), monkeypatch)
        assert run_on(LocalStorage(output), settings_of(shards, output), monkeypatch) == ExitCode.DONE
        assert final_bytes(output) == final_bytes(tmp_path / "whole"), f"operation {number}"


def run_on(storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> ExitCode:
    monkeypatch.setattr("pipeline.run.open_storage", lambda path, **options: storage)
    return run_fake(settings)


def test_two_workers_make_the_bytes_of_one(shards: Path, tmp_path: Path) -> None:
    for shard in range(2, 6):
        (shards / f"{shard}.jsonl").write_bytes(
            (shards / "0.jsonl").read_bytes().replace(b'"0-', b'"%d-' % shard)
        )
    assert run_fake(settings_of(shards, tmp_path / "one")) == ExitCode.DONE
    codes: list[ExitCode] = []

    def work() -> None:
        settings = settings_of(shards, tmp_path / "two")
        codes.append(run_job(settings, load_model=fake_model, make_engine=fake_engine, stop=StopRequest(5.0)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ExitCode.DONE in codes
    assert final_bytes(tmp_path / "two") == final_bytes(tmp_path / "one")


def crash(request_id: str = "") -> None:
    raise Crash(request_id)


def test_a_lost_order_is_told_with_what_to_do(shards: Path, tmp_path: Path) -> None:
    settings = settings_of(shards, tmp_path / "out")
    with pytest.raises(Crash):
        run_fake(settings, lambda *_: FakeEngine(max_num_seqs=4, crash_on={"0:20"}, crash=crash))
    [record] = (tmp_path / "out").glob("_state/*/orders/00000/*")
    content = record.read_bytes()
    other = WindowOrder(shard=0, start=0, stop=30)  # the two must not be mixed
    record.unlink()
    record.write_bytes(other.to_bytes())
    with pytest.raises(OutputError, match=r"is not the order that committed chunks were made in; put .*back"):
        run_fake(settings)
    record.unlink()
    record.write_bytes(content)
    assert run_fake(settings) == ExitCode.DONE
