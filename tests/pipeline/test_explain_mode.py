"""`mode=explain`: what is told of each shard, and of what another command would invalidate."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.exit_codes import ExitCode
from pipeline.explain_mode import explain_job
from pipeline.process_identity import ProcessIdentity
from pipeline.run import main, open_output
from pipeline.settings import Settings
from pipeline.storage import open_storage
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import fake_engine, fake_model, job_settings, run_fake, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "in", num_shards=2)


def explain(settings: Settings, capsys: pytest.CaptureFixture[str], fingerprint: str = "fake-1") -> list[str]:
    capsys.readouterr()
    model = fake_model(settings, fingerprint)
    assert explain_job(settings, open_output(settings.output), model) is ExitCode.DONE
    return capsys.readouterr().out.splitlines()


class Died(BaseException):
    pass


def half_done(settings: Settings, owner: ProcessIdentity | None = None) -> None:
    """A worker that ends without a word when it has committed the first shard and some of the second."""

    def make_engine(loaded, settings):
        engine = fake_engine(loaded, settings)

        def die(request_id: str) -> None:
            raise Died

        engine._crash_on, engine._crash = frozenset({"1:7"}), die
        return engine

    with pytest.raises(Died):
        run_fake(settings, make_engine, owner=owner)


def test_each_shard_and_the_way_on(shards: Path, tmp_path: Path, capsys):
    settings = job_settings(shards, tmp_path / "out", input__order="input")
    assert explain(settings, capsys) == [
        f"{tmp_path / 'out'}: nothing is there yet; the command would begin a run of 2 shards"
    ]
    here = ProcessIdentity.of_this_process()
    half_done(settings, owner=here)
    storage = open_storage(str(tmp_path / "out"))
    assert storage.list("data") == ["part-00000-of-00002.parquet"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    first, finished, running, verdict = explain(settings, capsys)
    assert first.startswith(f"{tmp_path / 'out'}: in progress, run ")
    assert finished == "      0 0.jsonl: finished; 8 of 8 rows in 3 of 3 chunks"
    assert running.startswith("      1 1.jsonl: running; ")
    assert running.endswith(f"held by {here.host} process {here.pid}")
    assert verdict == "This command goes on with the run: 1 of 2 shards are left."
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before, (
        "it only looks"
    )
    assert run_fake(job_settings(shards, tmp_path / "whole")) is ExitCode.DONE
    settings = job_settings(shards, tmp_path / "whole")
    assert explain(settings, capsys)[-1] == "This command goes on with the run: 0 of 2 shards are left."


def test_what_a_change_would_invalidate_and_why(shards: Path, tmp_path: Path, capsys):
    output = tmp_path / "out"
    settings = job_settings(shards, output, input__order="input")
    half_done(settings)
    waiting = explain(settings, capsys)[2]
    assert "1.jsonl: waiting" in waiting, "its worker is certainly gone"
    num_chunks = 3 + int(waiting.partition(" rows in ")[2].partition(" of")[0])

    def verdict(lines: list[str]) -> str:
        assert f"would invalidate 1 finished shards and {num_chunks} committed chunks" in lines[-1]
        return lines[-2]

    other = job_settings(shards, output, input__order="input", sampling__max_tokens=7)
    assert "sampling differs (sampling.max_tokens: 6 -> 7)" in verdict(explain(other, capsys))
    other = job_settings(shards, output, input__order="input", output__chunk_rows=4)
    assert "config.output.chunk_rows: 3 -> 4" in verdict(explain(other, capsys))
    assert 'model: "fake-1" -> "fake-2"' in verdict(explain(settings, capsys, fingerprint="fake-2"))

    write_jsonl(shards / "1.jsonl", lines([{"id": "1-0", "prompt": "another"}]))
    write_jsonl(shards / "2.jsonl", lines([{"id": "2-0", "prompt": "a new one"}]))
    told = explain(settings, capsys)
    assert "its input changed" not in told[1]
    assert "its input changed: ends_sha256 " in told[2]
    assert told[3] == "  new   2.jsonl: not in this run"
    assert "input differs" in verdict(told)
    (shards / "1.jsonl").unlink()
    assert "1.jsonl: waiting" in explain(settings, capsys)[2]
    assert explain(settings, capsys)[2].endswith("its input is gone")


def test_the_command_explains_without_loading_weights(
    shards: Path, tmp_path: Path, tiny_checkpoint: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    """What it hashes is what a run would have put on record."""
    command = [f"model.source={tiny_checkpoint}", f"input.path={shards}", f"output.path={tmp_path / 'out'}"]
    command += ["sampling.max_tokens=4", "engine.max_model_len=64", "engine.max_num_seqs=4", "progress=off"]
    command += ["engine.kv_cache_bytes=1000000"]
    assert main(command) == 0

    def refuse(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("pipeline.run.load_model", refuse)
    capsys.readouterr()
    assert main([*command, "mode=explain"]) == 0
    assert "This command goes on with the run: 0 of 2 shards are left." in capsys.readouterr().out
