"""A job shows what it does while it runs, and does the same as one that shows nothing."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.engine import Engine
from engine.errors import ConfigError
from engine.observer import EngineObserver, StepFacts
from pipeline.exit_codes import ExitCode
from pipeline.job_metrics import JobMetrics
from pipeline.ledger import Ledger
from pipeline.local_storage import LocalStorage
from pipeline.metrics import Metrics
from pipeline.monitoring import JobMonitoring, MonitoringSettings
from pipeline.progress import Standing
from pipeline.run import run_job
from pipeline.settings import Settings
from tests.engine.engines import tiny_engine, varied_model
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import final_bytes, job_settings
from tests.pipeline.small_run import open_ledger

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def scrape(port: int) -> dict[str, float]:
    """Values by name, with the labels that are not the engine's behind it."""
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        " ".join(
            [sample.name.removeprefix("tidemill_"), *(v for k, v in sample.labels.items() if k != "engine")]
        ): (sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of eight rows each, of which one is no JSON."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        rows = [{"id": f"{shard}-{i}", "prompt": f"say {shard} and {i}"} for i in range(7)]
        write_jsonl(folder / f"{shard}.jsonl", lines(rows) + b"{nothing\n")
    return folder


def run(settings: Settings) -> ExitCode:
    return run_job(settings, load_model=lambda _: varied_model(), make_engine=lambda *_: tiny_engine())


def settings_of(shards: Path, output: Path, **monitoring: Any) -> Settings:
    return job_settings(
        shards,
        output,
        engine__max_num_seqs=8,
        engine__max_model_len=128,
        engine__page_size=16,
        max_reject_fraction=0.5,
        **{f"monitoring__{name}": value for name, value in monitoring.items()},
    )


class Scraper(EngineObserver):
    """Looks at the endpoint during each step, from the middle of the job."""

    def __init__(self, port: int):
        self.port = port
        self.seen: list[dict[str, float]] = []

    def on_step(self, facts: StepFacts) -> None:
        self.seen.append(scrape(self.port))


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = tiny_engine()
    made.observers = []
    yield made
    made.observers = []


def test_a_job_exposes_its_work_and_makes_the_same_bytes(
    engine: Engine,
    shards: Path,
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert run(settings_of(shards, tmp_path / "plain")) == ExitCode.DONE
    before = engine.totals()
    capsys.readouterr()

    last: dict[str, float] = {}
    leave = JobMonitoring.__exit__

    def look_and_leave(self: JobMonitoring, *error: object) -> None:
        last.update(scrape(free_port))
        leave(self, *error)

    monkeypatch.setattr(JobMonitoring, "__exit__", look_and_leave)
    scraper = Scraper(free_port)
    engine.add_observer(scraper)
    settings = settings_of(
        shards, tmp_path / "shown", prometheus_port=free_port, dashboard_port=free_port, console=True
    )
    assert run(settings) == ExitCode.DONE
    assert engine.observers == [scraper], "the job's own are gone with it"

    assert final_bytes(tmp_path / "shown") == final_bytes(tmp_path / "plain")
    done = [seen["job_rows_done_total"] for seen in scraper.seen]
    assert done == sorted(done), "what is done only grows"
    assert done[0] < 24
    assert scraper.seen[0]["job_rows"] == 24
    assert {seen["job_shards"] for seen in scraper.seen} == {3}

    after = engine.totals()
    assert last["job_rows_done_total"] == 24
    assert last["job_rows_rejected_total"] == last["job_rejects_committed_total not_json"] == 3
    assert last["job_shards_finished_total"] == 3
    assert last["job_chunks"] == last["job_chunks_committed_total won"] == 9
    assert last["job_chunks_committed_total lost"] == 0
    assert last["requests_total completed"] == 21
    assert last["tokens_generated_total"] == after.num_generated_tokens
    assert last["model_execution_duration_seconds_count"] == after.num_steps - before.num_steps
    said = capsys.readouterr().err
    assert f"prometheus: http://127.0.0.1:{free_port}/metrics\n" in said
    assert re.search(r"^model: .* tokens/s.*21 finished requests", said, re.MULTILINE)
    assert "Rows: 24 of 24 (100%), Rejected rows: 3, Chunks committed: 9, Shards finished: 3 of 3" in said

    # Started again with other monitoring, it is the same run, and there is nothing left to do.
    monkeypatch.undo()
    assert run(settings_of(shards, tmp_path / "shown")) == ExitCode.DONE


def test_a_port_in_use_ends_a_job_before_its_model_is_loaded(shards: Path, tmp_path: Path):
    def load(_: Settings) -> Any:
        raise AssertionError("the model is loaded")

    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"monitoring.prometheus_port={port}: cannot listen on"):
            run_job(settings_of(shards, tmp_path / "out", prometheus_port=port), load_model=load)


def test_what_a_resumed_attempt_begins_with_is_counted(tmp_path: Path):
    """On a real ledger: rows of finished shards count from the start, and an attempt's losses are seen."""
    with open_ledger(LocalStorage(tmp_path / "output"), tmp_path / "spool") as ledger:
        ledger_of: Ledger = ledger
        job = JobMetrics(ledger_of)
        job.stands(Standing(5, 14, 2, 10, 0, 9))
        job.committed(Metrics(rejected={"not_json": 2}, store_requests={"put": 3}, wait_seconds=0.5), True)
        job.committed(Metrics(rejected={"not_json": 9}, store_requests={"put": 1, "get": 4}), False)
        job.shard_finished()
    found = {(each.definition.name, *each.labels): each.value for each in job.samples()}
    assert found == {
        ("job_rows",): 14,
        ("job_rows_done_total",): 5,
        ("job_rows_rejected_total",): 2,
        ("job_rejects_committed_total", "not_json"): 2,
        ("job_shards",): 2,
        ("job_shards_finished_total",): 1,
        ("job_chunks",): 6,
        ("job_chunks_committed_total", "won"): 1,
        ("job_chunks_committed_total", "lost"): 1,
        ("job_store_requests_total", "put"): 4,
        ("job_store_requests_total", "get"): 4,
        ("job_wait_seconds_total",): 0.5,
    }
    assert job.facts()["Shards finished"] == "1 of 2"


def test_workers_of_a_machine_have_ports_of_their_own():
    shown = MonitoringSettings(prometheus_port=9000, dashboard_port=0, console=True)
    assert shown.of_worker(3) == MonitoringSettings(prometheus_port=9003, dashboard_port=0)
    assert MonitoringSettings().of_worker(3) == MonitoringSettings()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"monitoring__prometheus_port": 70_000}, "monitoring.prometheus_port=70000: give a port from 0"),
        (
            {"monitoring__dashboard_port": "web"},
            "monitoring.dashboard_port='web': expected an integer or null",
        ),
        ({"monitoring__console": True, "progress": "bar"}, "monitoring.console=true and progress=bar"),
        ({"monitoring__consol": True}, "did you mean 'monitoring.console'?"),
    ],
)
def test_bad_settings_are_refused(overrides: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        job_settings(Path("in"), "out", **overrides)
