"""An output folder belongs to one configuration; any other is refused, or forks, and says what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, OutputError
from pipeline.fingerprint import REDACTED, redact
from pipeline.lease import Suspects
from pipeline.ledger import Ledger
from pipeline.local_storage import LocalStorage
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.small_run import PARTS, Crash, fill, open_ledger, results, small_plan, undisturbed, work


def spool_of(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def commit_one(ledger: Ledger) -> None:
    lease = ledger.claim(0)
    assert lease is not None
    files = fill(ledger, lease, 0, FakeEngine(), Suspects(frozenset(), frozenset()))
    assert ledger.commit_chunk(lease, files, input_version={"size": 0})


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("config", {"max_tokens": 7}, "config differs (config.max_tokens: 6 -> 7)"),
        ("model", "m-2", 'model differs (model: "m-1" -> "m-2")'),
        (
            "inputs",
            [{"url": "a", "version": {"size": 2}}],
            "inputs differs (inputs[a].version.size: 1 -> 2)",
        ),
        ("inputs", [], "inputs differs (inputs: 1 entries -> 0)"),
    ],
)
def test_a_changed_part_is_refused_and_named(tmp_path: Path, part: str, value: Any, said: str):
    with open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path)) as ledger:
        commit_one(ledger)
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(OutputError) as caught:
        open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path), parts=PARTS | {part: value})
    message = str(caught.value)
    assert said in message
    assert "0 finished shards and 1 committed chunks" in message
    assert "resume.on_change=fork" in message
    assert "\n" not in message
    assert sorted((tmp_path / "out").rglob("*")) == before, "nothing half made"


def test_a_fork_keeps_the_other_results_and_resumes_too(tmp_path: Path):
    expected = undisturbed(tmp_path)
    output = tmp_path / "out"
    work(LocalStorage(output), spool_of(tmp_path))
    other = PARTS | {"model": "m-2"}
    with pytest.raises(Crash):
        work(LocalStorage(output), spool_of(tmp_path), parts=other, on_change="fork", crash_on=["1-1"])
    work(LocalStorage(output), spool_of(tmp_path), parts=other, on_change="fork")
    (fork,) = output.glob("fork-*")
    assert results(output) == results(fork) == expected
    with open_ledger(LocalStorage(output), spool_of(tmp_path), on_change="fork") as ledger:
        assert not ledger.is_fork
        assert ledger.unfinished() == []
    with pytest.raises(ConfigError, match="refuse"):
        open_ledger(LocalStorage(output), spool_of(tmp_path), on_change="overwrite")


def test_nothing_is_made_when_there_is_no_plan(tmp_path: Path):
    def fail() -> Any:
        raise OutputError("the input is bad")

    with pytest.raises(OutputError, match="the input is bad"):
        Ledger.open(
            LocalStorage(tmp_path / "out"),
            parts=PARTS,
            config={},
            make_plan=fail,
            spool_dir=spool_of(tmp_path),
            merge_metrics=list,  # pyright: ignore[reportArgumentType] - not reached
        )
    assert not (tmp_path / "out").exists()


def test_the_first_plan_stays_the_plan(tmp_path: Path):
    with open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path), small_plan(chunk_rows=2)) as ledger:
        assert ledger.plan.chunk_rows == 2
    with open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path), small_plan(chunk_rows=5)) as ledger:
        assert ledger.plan == small_plan(chunk_rows=2)


def test_folders_that_are_not_ours_are_left_alone(tmp_path: Path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "mine.csv").write_text("1")
    with pytest.raises(OutputError, match=r"no job\.json"):
        work(LocalStorage(tmp_path / "out"), spool_of(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "job.json").write_text("{}")
    with pytest.raises(OutputError, match=r"not a job\.json of Tidemill"):
        work(LocalStorage(tmp_path / "other"), spool_of(tmp_path))


def test_secrets_reach_neither_the_folder_nor_the_fingerprint(tmp_path: Path):
    for key in ("abc", "def"):
        parts = PARTS | {"config": {"api_key": key, "url": f"https://u:{key}@h/?X-Amz-Signature={key}&a=1"}}
        work(LocalStorage(tmp_path / "out"), spool_of(tmp_path), parts=parts)
    text = "".join(path.read_text(errors="replace") for path in (tmp_path / "out").rglob("*.json"))
    assert "hf_secret" not in text
    assert (
        "abc" not in json.loads((tmp_path / "out/job.json").read_text())["parts"]["config"]["value"].values()
    )
    assert json.loads((tmp_path / "out/job.json").read_text())["config"]["hub_token"] == "<removed>"


def test_what_is_a_secret_and_what_is_not():
    secret = {
        "api_key": "x",
        "hubToken": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "db": {"password": "x"},
        "keys": ["x"],
    }
    assert redact(secret) == {
        "api_key": REDACTED,
        "hubToken": REDACTED,
        "AWS_SECRET_ACCESS_KEY": REDACTED,
        "db": {"password": REDACTED},
        "keys": [REDACTED],
    }
    plain = {
        "max_tokens": 5,
        "stop_token_ids": [1],
        "prompt_token_ids": "ids",
        "tokenizer": "t",
        "monkey": "m",
    }
    assert redact(plain) == plain


def test_a_run_that_another_begins_at_the_same_moment_is_joined(tmp_path: Path):
    """Between a worker's look for job.json and its look for anything else, another has begun the run."""

    class Racing(LocalStorage):
        is_raced = False

        def list(self, folder: str) -> list[str]:
            if not self.is_raced:
                self.is_raced = True
                open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path)).close()
            return super().list(folder)

    storage = Racing(tmp_path / "out")
    with open_ledger(storage, spool_of(tmp_path)) as ledger:
        commit_one(ledger)
    assert storage.is_raced
    (tmp_path / "out/job.json").unlink()
    with pytest.raises(OutputError, match=r"holds _state/ but no job\.json"):
        open_ledger(LocalStorage(tmp_path / "out"), spool_of(tmp_path))
