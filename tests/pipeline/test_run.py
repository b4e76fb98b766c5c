"""The job from input files to a finished output: what it makes, how it resumes, how it refuses and stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engine.errors import ConfigError, InputError, OutputError
from pipeline import tally, worker
from pipeline.exit_codes import ExitCode
from pipeline.job_plan import make_plan
from pipeline.ledger import Ledger
from pipeline.metrics import merge_chunks
from pipeline.settings import Settings
from pipeline.signals import StopRequest
from pipeline.storage import open_storage
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl, write_parquet
from tests.pipeline.job_helpers import (
    commits,
    fake_engine,
    fake_model,
    final_bytes,
    job_settings,
    run_fake,
    write_shards,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("input"))


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to; read only."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_fake(job_settings(shards, output)) == ExitCode.DONE
    return output


def no_engine(loaded: Any, settings: Settings) -> FakeEngine:
    raise AssertionError("the engine was started for nothing")


class Crash(BaseException):
    """Ends a run where it stands; nothing in the pipeline catches it."""


class ActingEngine(FakeEngine):
    """Does something before the steps that are named."""

    def __init__(self, actions: dict[int, Any], settings: Settings):
        super().__init__(max_num_seqs=settings.engine.max_num_seqs, seed=settings.engine.seed)
        self.actions = actions
        self.steps_taken = 0
        self.requests: list[str] = []

    def add_request(self, request_id: str, *args: Any, **options: Any) -> None:
        self.requests.append(request_id)
        super().add_request(request_id, *args, **options)

    def step(self) -> list[Any]:
        if self.steps_taken in self.actions:
            self.actions[self.steps_taken]()
        self.steps_taken += 1
        return super().step()


def crash() -> None:
    raise Crash


def test_a_run_gives_every_row_in_input_order(undisturbed: Path) -> None:
    ids = []
    for shard in range(3):
        table = pq.read_table(undisturbed / "data" / f"part-0000{shard}-of-00003.parquet")
        ids += table["row_id"].to_pylist()
        assert set(table["status"].to_pylist()) == {"ok"}
    assert ids == [f"{shard}-{i}" for shard in range(3) for i in range(8)]


def test_the_metrics_of_all_shards_add_up_to_the_run(undisturbed: Path) -> None:
    shards = [json.loads(file.read_bytes()) for file in sorted((undisturbed / "metrics").glob("*.json"))]
    data = [pq.read_table(file) for file in sorted((undisturbed / "data").glob("*.parquet"))]
    assert [shard["rows_in"] for shard in shards] == [8, 8, 8]
    assert sum(shard["generated_tokens"] for shard in shards) == sum(
        sum(table["num_generated_tokens"].to_pylist()) for table in data
    )
    # Every step was counted in exactly one shard: all tokens are in steps of 4 rows at most.
    assert sum(shard["num_steps"] for shard in shards) == sum(s["step_seconds"]["count"] for s in shards) > 0
    assert all(shard["attempts"][0]["device"] == "fake" for shard in shards)
    assert json.loads((undisturbed / "manifest.json").read_bytes())


def test_starting_a_finished_run_again_starts_no_engine(shards: Path, undisturbed: Path, capsys: Any) -> None:
    before = final_bytes(undisturbed)
    assert run_fake(job_settings(shards, undisturbed), no_engine) == ExitCode.DONE
    assert final_bytes(undisturbed) == before
    assert "everything here was made before" in capsys.readouterr().out


def test_the_summary_says_what_was_made_and_where(shards: Path, tmp_path: Path, capsys: Any) -> None:
    run_fake(job_settings(shards, tmp_path / "out"))
    shown = capsys.readouterr().out
    assert shown.startswith("Done: 24 rows in 3 shards.")
    assert "24 ok, of 24" in shown
    assert "tokens/s out" in shown
    assert f'open_run("{tmp_path / "out"}")' in shown


@pytest.mark.parametrize("step", [0, 1, 3, 6, 10, 15, 21])
def test_a_crash_at_any_step_loses_and_doubles_nothing(
    shards: Path, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    settings = job_settings(shards, tmp_path / "out")
    with pytest.raises(Crash):
        run_fake(settings, lambda _, s: ActingEngine({step: crash}, s))
    kept = commits(tmp_path / "out")
    engines: list[ActingEngine] = []

    def second(_: Any, settings: Settings) -> ActingEngine:
        engines.append(ActingEngine({}, settings))
        return engines[0]

    assert run_fake(settings, second) == ExitCode.DONE
    assert final_bytes(tmp_path / "out") == final_bytes(undisturbed)
    # What was committed is kept as it was, and none of its rows ran again.
    assert kept.items() <= commits(tmp_path / "out").items()
    again = {tuple(map(int, request.split(":"))) for request in engines[0].requests}
    for record in kept.values():
        assert not {(record["shard"], row) for row in range(record["start"], record["stop"])} & again


@pytest.mark.parametrize("step", [2, 7, 12])
def test_a_drain_commits_what_is_complete_and_the_next_start_goes_on(
    shards: Path, undisturbed: Path, tmp_path: Path, step: int, capsys: Any
) -> None:
    settings = job_settings(shards, tmp_path / "out")
    stop = StopRequest(5.0)
    engine = ActingEngine({step: lambda: stop.ask("SIGTERM")}, settings)
    assert run_fake(settings, lambda *_: engine, stop) == ExitCode.DRAINED
    assert "Stopped by SIGTERM" in capsys.readouterr().out
    assert not engine.has_unfinished
    kept = commits(tmp_path / "out")
    # Everything that had been handed to the engine belongs to a chunk that is committed or was incomplete.
    assert all(record["counts"]["rows"] == record["stop"] - record["start"] for record in kept.values())
    assert run_fake(settings) == ExitCode.DONE
    assert final_bytes(tmp_path / "out") == final_bytes(undisturbed)


def test_a_drain_without_time_abandons_rows_in_flight(shards: Path, tmp_path: Path) -> None:
    stop = StopRequest(0.0)
    settings = job_settings(shards, tmp_path / "out")
    engine = ActingEngine({5: lambda: stop.ask("SIGINT")}, settings)
    assert run_fake(settings, lambda *_: engine, stop) == ExitCode.DRAINED
    assert engine.steps_taken == 6


def test_bad_rows_become_rejects_and_the_run_goes_on(tmp_path: Path, capsys: Any) -> None:
    rows = [{"id": str(i), "prompt": f"row {i}"} for i in range(6)]
    good = lines(rows[:3]) + b"not json\n" + lines([{"id": "0", "prompt": "again"}, {"id": "9"}])
    write_jsonl(tmp_path / "in" / "a.jsonl", good + lines([{"id": "8", "prompt": "x" * 2000}, *rows[3:]]))
    settings = job_settings(tmp_path / "in", tmp_path / "out", max_reject_fraction=0.9)
    assert run_fake(settings) == ExitCode.DONE
    table = pq.read_table(tmp_path / "out" / "data" / "part-00000-of-00001.parquet")
    assert table["row_id"].to_pylist() == [str(i) for i in range(6)]
    rejects = (tmp_path / "out" / "rejects" / "part-00000-of-00001.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in rejects]
    assert reasons == ["not_json", "duplicate_id", "missing_column", "prompt_too_long"]
    shown = capsys.readouterr().out
    assert "6 ok, 4 rejected, of 10" in shown
    assert "duplicate_id 1, missing_column 1, not_json 1, prompt_too_long 1" in shown


def test_too_many_rejects_end_with_their_own_exit_code_and_keep_everything(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines([{"id": "0", "prompt": "fine"}, {"id": "1"}]))
    assert run_fake(job_settings(tmp_path / "in", tmp_path / "out")) == ExitCode.TOO_MANY_REJECTS
    assert (tmp_path / "out" / "manifest.json").exists()
    # Raising the limit changes no result, so it needs no work.
    settings = job_settings(tmp_path / "in", tmp_path / "out", max_reject_fraction=0.5)
    assert run_fake(settings, no_engine) == ExitCode.DONE


def test_a_large_input_of_rejects_is_stopped_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "REJECTS_BEFORE_STOPPING", 4)
    for shard in range(4):
        write_jsonl(tmp_path / "in" / f"{shard}.jsonl", lines([{"id": f"{shard}-{i}"} for i in range(3)]))
    settings = job_settings(tmp_path / "in", tmp_path / "out", max_reject_fraction=0.25)
    assert run_fake(settings) == ExitCode.TOO_MANY_REJECTS
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = commits(tmp_path / "out")
    assert 1 <= len(kept) < 4
    settings = job_settings(tmp_path / "in", tmp_path / "out", max_reject_fraction=1.0)
    assert run_fake(settings) == ExitCode.DONE


def test_input_columns_are_carried_with_their_types(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "p", "score": i / 2, "tags": ["a"] * i} for i in range(4)]
    write_parquet(tmp_path / "in" / "a.parquet", rows)
    settings = job_settings(tmp_path / "in", tmp_path / "out", input__carry_columns=["score", "tags"])
    assert run_fake(settings) == ExitCode.DONE
    table = pq.read_table(tmp_path / "out" / "data" / "part-00000-of-00001.parquet")
    assert table["input_score"].to_pylist() == [0.0, 0.5, 1.0, 1.5]
    assert table["input_tags"].to_pylist() == [[], ["a"], ["a", "a"], ["a", "a", "a"]]


def test_a_rows_text_follows_from_its_id_and_not_from_its_place(tmp_path: Path) -> None:
    rows = [{"id": f"row-{i}", "prompt": "the same for all"} for i in range(7)]
    texts = []
    for name, order in (("forward", rows), ("backward", rows[::-1])):
        write_jsonl(tmp_path / name / "a.jsonl", lines(order))
        assert run_fake(job_settings(tmp_path / name, tmp_path / f"{name}-out")) == ExitCode.DONE
        table = pq.read_table(tmp_path / f"{name}-out" / "data" / "part-00000-of-00001.parquet")
        texts.append(dict(zip(table["row_id"].to_pylist(), table["text"].to_pylist(), strict=True)))
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) == 7


def test_several_samples_and_token_ids(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines([{"id": "x", "prompt": "p"}]))
    settings = job_settings(
        tmp_path / "in",
        tmp_path / "out",
        sampling__n=3,
        output__include_token_ids=True,
        output__format="jsonl",
    )
    assert run_fake(settings) == ExitCode.DONE
    written = (tmp_path / "out" / "data" / "part-00000-of-00001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert [row["sample_index"] for row in rows] == [0, 1, 2]
    assert all(len(row["token_ids"]) == row["num_generated_tokens"] for row in rows)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling__max_tokens": 7}, "max_tokens"),
        ({"engine__seed": 3}, "engine.seed"),
        ({"output__chunk_rows": 4}, "output.chunk_rows"),
        ({"prompt__template": "{{ prompt }}!"}, "template"),
    ],
)
def test_an_output_of_other_settings_is_refused_by_what_differs(
    shards: Path, undisturbed: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(OutputError, match=named) as refused:
        run_fake(job_settings(shards, undisturbed, **change), no_engine)
    assert "\n" not in str(refused.value)


def test_a_fork_begins_anew_beside_what_is_there(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run_fake(job_settings(shards, output)) == ExitCode.DONE
    before = final_bytes(output)
    changed = job_settings(shards, output, engine__seed=3, resume__on_change="fork")
    assert run_fake(changed) == ExitCode.DONE
    assert final_bytes(output) == before
    [fork] = output.glob("fork-*")
    assert final_bytes(fork).keys() == before.keys()


def test_a_shard_that_changes_during_the_run_ends_and_the_others_go_on(tmp_path: Path, capsys: Any) -> None:
    folder = write_shards(tmp_path / "in")
    settings = job_settings(folder, tmp_path / "out")

    def change() -> None:
        write_jsonl(folder / "1.jsonl", lines([{"id": f"other-{i}", "prompt": "changed"} for i in range(8)]))

    engine = ActingEngine({1: change}, settings)
    assert run_fake(settings, lambda *_: engine) == ExitCode.BAD_CONFIG
    assert "1.jsonl" in capsys.readouterr().err
    finished = sorted(file.name for file in (tmp_path / "out" / "data").iterdir())
    assert finished == ["part-00000-of-00003.parquet", "part-00002-of-00003.parquet"]
    assert not any(key.startswith("00001/") for key in commits(tmp_path / "out"))


def test_a_shard_that_another_process_holds_is_left_to_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(worker, "HELD_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("pipeline.sharing.HELD_POLL_SECONDS", 0.0)
    settings = job_settings(shards, tmp_path / "out")
    stop = StopRequest(5.0)
    # A first start leaves a plan behind; then this test holds a lease as a process that lives would.
    assert run_fake(settings, lambda _, s: ActingEngine({0: lambda: stop.ask("SIGTERM")}, s), stop) == 143
    [job] = (tmp_path / "out").glob("job.json")
    parts = {name: part["value"] for name, part in json.loads(job.read_bytes())["parts"].items()}
    other = Ledger.open(
        open_storage(str(tmp_path / "out")),
        parts=parts,
        config={},
        make_plan=lambda: make_plan(settings, []),
        spool_dir=tmp_path / "spool",
        merge_metrics=merge_chunks,
    )
    with other:
        assert other.claim(1) is not None
        assert run_fake(settings) == ExitCode.RETRY_LATER
        assert "Another process holds" in capsys.readouterr().out
    assert run_fake(settings) == ExitCode.DONE


def test_an_input_that_matches_nothing_leaves_nothing_half_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere"):
        run_fake(job_settings(tmp_path / "nowhere", tmp_path / "out"), no_engine)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_is_refused_before_the_model_is_loaded(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        run_fake(job_settings(shards, tmp_path / "file" / "out"), no_engine)


def test_what_the_engine_refuses_leaves_nothing_half_made(shards: Path, tmp_path: Path) -> None:
    def too_small(loaded: Any, settings: Settings) -> FakeEngine:
        raise ConfigError("the KV cache has room for 0 pages")

    with pytest.raises(ConfigError, match="room for 0 pages"):
        run_fake(job_settings(shards, tmp_path / "out"), too_small)
    assert not (tmp_path / "out").exists()


def test_a_missing_accelerator_is_told_before_the_input_is_read(tmp_path: Path) -> None:
    settings = job_settings(tmp_path / "nowhere", tmp_path / "out", engine__platform="tpu")
    with pytest.raises(ConfigError, match=r"engine\.platform=tpu .* no TPU") as refused:
        run_fake(settings, no_engine)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_model_is_not_part_of_what_may_change(shards: Path, undisturbed: Path) -> None:
    from pipeline.run import run_job

    with pytest.raises(OutputError, match="model differs"):
        run_job(
            job_settings(shards, undisturbed),
            load_model=lambda settings: fake_model(settings, "fake-2"),
            make_engine=fake_engine,
        )
