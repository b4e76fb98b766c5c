"""Saved datasets: declared slices of a fixed number of rows, whose union is the dataset."""

from __future__ import annotations

import json

import datasets
import pytest

from engine.errors import ConfigError, InputError
from pipeline.rows import SourceRow
from pipeline.shards import InputSettings, check_columns, count_rows, current_version, list_shards, read_rows
from tests.pipeline.input_helpers import write_jsonl

ROWS = [
    {"prompt": f"p{i}", "messages": [{"role": "user", "content": f"m{i}"}], "n": None if i % 3 else i}
    for i in range(23)
]


@pytest.fixture
def saved(tmp_path) -> str:
    path = str(tmp_path / "saved")
    datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)
    return path


@pytest.mark.parametrize("rows_per_shard", [1, 8, 10, 23, 100])
def test_slices_join_to_the_whole(saved, rows_per_shard):
    settings = InputSettings(path=saved, rows_per_shard=rows_per_shard)
    shards = list_shards(settings)
    assert len(shards) == -(-23 // rows_per_shard)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert len({shard.name for shard in shards}) == len(shards)
    assert {shard.format for shard in shards} == {"datasets"}
    found = []
    for shard in shards:
        rows = list(read_rows(shard, settings))
        assert count_rows(shard) == len(rows)
        assert [row.position for row in rows] == list(range(len(rows)))
        for k in range(len(rows) + 2):
            assert list(read_rows(shard, settings, 0, k)) == rows[:k]
            assert list(read_rows(shard, settings, k)) == rows[k:]
        found += [row for row in rows if isinstance(row, SourceRow)]
    assert [row.columns for row in found] == ROWS
    # Where a row comes from does not depend on how the dataset is sliced.
    assert [(row.source, row.place) for row in found] == [("data", f"data row {i}") for i in range(23)]


def test_only_the_columns_asked_for(saved):
    settings = InputSettings(path=saved)
    [shard] = list_shards(settings)
    [row] = read_rows(shard, settings, 3, 4, columns=("n", "absent"))
    assert isinstance(row, SourceRow)
    assert row.columns == {"n": 3}
    assert [row.position for row in read_rows(shard, settings, 21, columns=("absent",))] == [21, 22]
    with pytest.raises(InputError, match="no column 'promp'; did you mean 'prompt'"):
        check_columns([shard], ("promp",))


def test_a_filtered_dataset_reads_its_own_rows(tmp_path):
    path = str(tmp_path / "filtered")
    datasets.Dataset.from_list(ROWS).filter(lambda row: row["n"] is None).save_to_disk(path)
    settings = InputSettings(path=path)
    [shard] = list_shards(settings)
    rows = [row.columns for row in read_rows(shard, settings) if isinstance(row, SourceRow)]
    assert rows == [row for row in ROWS if row["n"] is None]


def test_a_dataset_of_splits_needs_one_of_them(tmp_path):
    path = str(tmp_path / "splits")
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(2))}).save_to_disk(path)
    settings = InputSettings(path=path, split="test", format="datasets")
    [shard] = list_shards(settings)
    assert (shard.name, shard.source, count_rows(shard)) == ("test[0:2]", "test", 2)
    with pytest.raises(InputError, match=r"no input\.split is given; choose one of test, train"):
        list_shards(InputSettings(path=path))
    with pytest.raises(InputError, match="no split 'dev'"):
        list_shards(InputSettings(path=path, split="dev"))


def test_the_version_changes_with_the_files(saved, tmp_path):
    [shard] = list_shards(InputSettings(path=saved))
    assert json.loads(json.dumps(shard.version)) == shard.version
    assert current_version(shard) == shard.version
    again = str(tmp_path / "again")
    datasets.Dataset.from_list(ROWS[::-1]).save_to_disk(again, num_shards=2)
    [other] = list_shards(InputSettings(path=again))
    assert other.version != shard.version


def test_a_hub_dataset_is_pinned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"needs input\.revision"):
        list_shards(InputSettings(path="owner/name", format="datasets"))
    with pytest.raises(InputError, match="no such folder, and not a hub id"):
        list_shards(InputSettings(path="./owner/name", format="datasets", revision="abc"))
    with pytest.raises(ConfigError, match="copy the folder here first"):
        list_shards(InputSettings(path="s3://bucket/saved", format="datasets"))
    with pytest.raises(ConfigError, match="one dataset a run"):
        list_shards(InputSettings(path=["a/b", "c/d"], format="datasets"))


def test_what_is_not_a_saved_dataset_is_refused(saved, tmp_path):
    write_jsonl(tmp_path / "plain" / "a.jsonl", b"{}\n")
    with pytest.raises(InputError, match="not a folder written by save_to_disk"):
        list_shards(InputSettings(path=str(tmp_path / "plain"), format="datasets"))
    with pytest.raises(ConfigError, match="no meaning for the folder"):
        list_shards(InputSettings(path=saved, revision="abc"))
    empty = str(tmp_path / "none")
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(empty)
    with pytest.raises(InputError, match=r"has no rows|not a dataset"):
        list_shards(InputSettings(path=empty))


def test_a_damaged_arrow_file_is_an_error_that_names_the_folder(tmp_path):
    path = tmp_path / "damaged"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    [arrow] = path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(InputError, match="damaged"):
        list_shards(InputSettings(path=str(path)))
