"""What came out opens in a notebook, by the usual tools, while the run goes on and after."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from engine.errors import OutputError
from pipeline.local_storage import LocalStorage
from pipeline.process_identity import ProcessIdentity
from pipeline.results import open_run
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.small_run import Crash, fill, in_input_order, open_ledger, small_plan, work

NUM_SAMPLES = 18


@pytest.fixture(autouse=True)
def _simple_metrics(monkeypatch: pytest.MonkeyPatch):
    from tests.pipeline.small_run import merge_counts

    monkeypatch.setattr("pipeline.results.merge_chunks", merge_counts)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    work(LocalStorage(tmp_path / "out"), tmp_path / "spool")
    return tmp_path / "out"


def test_a_finished_run(output: Path):
    run = open_run(output)
    assert run.is_finished
    rows = list(run.rows())
    assert [row["row_id"] for row in rows][:4] == ["0-0", "0-1", "0-1", "0-2"]
    assert len(rows) == NUM_SAMPLES == len(list(run.trace()))
    assert [reject["reason"] for reject in run.rejects()] == ["not_json", "not_json"]
    frame = run.to_pandas()
    assert list(frame["text"]) == [row["text"] for row in rows]
    assert list(run.to_pandas("rows", ["row_id", "input_topic"]).columns) == ["row_id", "input_topic"]
    assert set(run.to_pandas("rejects")["position"]) == {4}
    assert run.to_arrow("trace", ["finished_s"]).num_rows == NUM_SAMPLES
    assert run.counts()["rows"] == 14
    assert run.config["hub_token"] == "<removed>"
    assert [(each["shard"], each["name"], each["rows"]) for each in run.metrics()] == [
        (0, "in-0", 7),
        (1, "in-1", 7),
    ]
    assert {(each.state, each.num_chunks_committed, each.num_rows_committed) for each in run.state()} == {
        ("finished", 3, 7)
    }
    with pytest.raises(ValueError, match="no column 'txt'; there are row_id"):
        run.to_pandas("rows", ["txt"])
    with pytest.raises(ValueError, match="must be 'rows'"):
        run.to_arrow("row")  # pyright: ignore[reportArgumentType]


def test_a_run_in_progress_shows_what_is_committed(tmp_path: Path):
    here = ProcessIdentity.of_this_process()
    with open_ledger(LocalStorage(tmp_path / "out"), tmp_path / "spool", owner=here) as ledger:
        run = open_run(tmp_path / "out")
        assert run.to_pandas().empty
        assert run.to_pandas("rejects").empty
        lease = ledger.claim(0)
        assert lease is not None
        for chunk in (2, 0):
            files = fill(ledger, lease, chunk, FakeEngine(), ledger.suspects(0), in_input_order)
            ledger.commit_chunk(lease, files, input_version={"size": 0})
        assert not run.is_finished
        assert [row["row_id"] for row in run.rows(["row_id"])] == ["0-0", "0-1", "0-1", "0-2", "0-6"]
        assert run.counts()["rows"] == 4
        first, second = run.state()
        assert (first.state, first.num_chunks_committed, first.num_rows_committed) == ("running", 2, 4)
        assert first.holder == f"{here.host} process {here.pid}"
        assert (second.state, second.num_chunks, second.holder) == ("waiting", 3, None)
        assert [(each["shard"], each["chunks"]) for each in run.metrics()] == [(0, 2)]
        lease.release()
    work(LocalStorage(tmp_path / "out"), tmp_path / "spool")
    assert run.is_finished, "the same object sees the progress"
    assert len(list(run.rows())) == NUM_SAMPLES


def test_a_dead_worker_holds_nothing(tmp_path: Path):
    with pytest.raises(Crash):
        work(LocalStorage(tmp_path / "out"), tmp_path / "spool", crash_on=["0-2"])
    first, _ = open_run(tmp_path / "out").state()
    assert (first.state, first.holder, first.num_chunks_committed) == ("waiting", None, 1)


def test_json_lines_open_with_their_types(tmp_path: Path):
    work(LocalStorage(tmp_path / "out"), tmp_path / "spool", small_plan(output_format="jsonl"))
    work(LocalStorage(tmp_path / "parquet"), tmp_path / "spool")
    run = open_run(tmp_path / "out")
    assert list(run.rows()) == list(open_run(tmp_path / "parquet").rows())
    assert run.to_arrow().schema.equals(open_run(tmp_path / "parquet").to_arrow().schema)
    shutil.rmtree(tmp_path / "out" / "_state")
    assert list(run.rows()) == list(open_run(tmp_path / "parquet").rows())


def test_a_finished_run_opens_without_its_state(output: Path):
    before = list(open_run(output).rows())
    shutil.rmtree(output / "_state")
    run = open_run(output)
    assert list(run.rows()) == before
    assert next(run.rows(["row_id"])) == {"row_id": "0-0"}
    assert run.counts()["rows"] == 14
    assert len(run.metrics()) == 2
    assert run.state() == []


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path, output: Path):
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(OutputError, match=r"holds no job\.json.*output\.path") as caught:
            open_run(place)
        assert "\n" not in str(caught.value)
    (output / "data/part-00001-of-00002.parquet").unlink()
    with pytest.raises(OutputError, match=r"part-00001-of-00002\.parquet is missing"):
        list(open_run(output).rows())


def test_pyarrow_opens_the_data_folder(output: Path):
    table = ds.dataset(output / "data").to_table()
    assert table.num_rows == NUM_SAMPLES
    assert table["row_id"].to_pylist() == [row["row_id"] for row in open_run(output).rows()]


@pytest.mark.parametrize(("folder", "split"), [("data", "train"), ("", "part")])
def test_datasets_opens_the_data_folder_and_the_whole_output(
    output: Path, tmp_path: Path, folder: str, split: str, monkeypatch: pytest.MonkeyPatch
):
    """The whole output too, though it holds other files: data/part-00000-of-00002 is a name that
    `datasets` knows.
    """
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(output / folder), cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded) == [split]
    assert loaded[split]["row_id"] == [row["row_id"] for row in open_run(output).rows()]
    assert loaded[split][0]["token_ids"] == next(open_run(output).rows())["token_ids"]
