"""Final files follow from the rows alone: not from chunks, attempts or who made them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import OutputError
from pipeline.finalise import Finaliser, json_line
from pipeline.local_storage import LocalStorage
from pipeline.manifest import check_balance
from pipeline.parquet_files import GroupedWriter, row_sizes, write_table
from pipeline.plan import RunPlan
from pipeline.run_state import RunState
from pipeline.schema import data_schema
from tests.pipeline.small_run import merge_counts, open_ledger, results, small_plan, undisturbed, work


def test_the_output_is_the_rows_in_input_order(tmp_path: Path):
    manifest = work(LocalStorage(tmp_path / "out"), tmp_path / "spool")
    assert manifest is not None
    table = pq.read_table(tmp_path / "out/data/part-00000-of-00002.parquet")
    assert table["row_id"].to_pylist() == ["0-0", "0-1", "0-1", "0-2", "0-3", "0-3", "0-5", "0-5", "0-6"]
    assert table["sample_index"].to_pylist() == [0, 0, 1, 0, 0, 1, 0, 1, 0]
    assert table["input_topic"].to_pylist()[0] == "topic 0 é"
    assert table.schema.metadata[b"tidemill.schema_version"] == b"1"
    assert (
        pq.ParquetFile(tmp_path / "out/data/part-00000-of-00002.parquet")
        .metadata.row_group(0)
        .column(0)
        .compression
        == "ZSTD"
    )
    rejects = (tmp_path / "out/rejects/part-00000-of-00002.jsonl").read_text().splitlines()
    assert [json.loads(line)["position"] for line in rejects] == [4]
    trace = pq.read_table(tmp_path / "out/trace/part-00000-of-00002.parquet")
    assert trace["row_id"].to_pylist() == table["row_id"].to_pylist()
    # Rows 0 to 5 ran as 5, 3, 1, 4, 2, 0, and row 4 was rejected.
    assert trace["chunk"].to_pylist() == [1, 0, 0, 1, 0, 0, 0, 0, 2]
    metrics = json.loads((tmp_path / "out/metrics/part-00000-of-00002.json").read_text())
    assert metrics == {"chunks": 3, "rows": 7}
    assert manifest["totals"]["rows"] == 14 == manifest["totals"]["ok"] + manifest["totals"]["rejected"]
    assert manifest["totals"]["samples"] == 2 * table.num_rows
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_the_bytes_do_not_depend_on_the_chunks(tmp_path: Path, output_format: str):
    made = []
    for chunk_rows in (1, 3, 100):
        plan = small_plan(chunk_rows=chunk_rows, output_format=output_format)
        made.append(undisturbed(tmp_path / str(chunk_rows), plan))
    assert all(each == made[0] for each in made)
    assert f"data/part-00000-of-00002.{output_format}" in made[0]


def test_row_groups_are_as_long_as_the_setting_says_whatever_the_chunks(tmp_path: Path):
    made = []
    for chunk_rows in (1, 3, 100):
        plan = dataclasses.replace(small_plan(chunk_rows=chunk_rows), row_group_rows=4)
        assert RunPlan.from_json(plan.to_json()) == plan
        made.append(undisturbed(tmp_path / str(chunk_rows), plan))
    assert all(each == made[0] for each in made)
    files = [tmp_path / "3/undisturbed" / f"{kind}/part-00000-of-00002.parquet" for kind in ("data", "trace")]
    for path in files:
        file = pq.ParquetFile(path).metadata
        sizes = [file.row_group(number).num_rows for number in range(file.num_row_groups)]
        assert sizes == [4, 4, 1]
    undisturbed(tmp_path / "long")
    whole = pq.read_table(tmp_path / "long/undisturbed/data/part-00000-of-00002.parquet")
    assert pq.read_table(files[0]).equals(whole)


def test_json_lines_hold_the_same_rows(tmp_path: Path):
    undisturbed(tmp_path / "p")
    undisturbed(tmp_path / "j", small_plan(output_format="jsonl"))
    rows = pq.read_table(tmp_path / "p/undisturbed/data/part-00001-of-00002.parquet").to_pylist()
    lines = (tmp_path / "j/undisturbed/data/part-00001-of-00002.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_a_shard_without_rows_or_without_results_is_finished_too(tmp_path: Path):
    for output_format in ("parquet", "jsonl"):
        plan = small_plan(num_rows=0, output_format=output_format)
        manifest = work(LocalStorage(tmp_path / output_format), tmp_path / "spool", plan)
        assert manifest is not None
        assert manifest["totals"]["rows"] == 0
    assert pq.read_table(tmp_path / "parquet/data/part-00000-of-00002.parquet").schema.equals(
        data_schema(plan.carried), check_metadata=True
    )
    assert not (tmp_path / "jsonl/data").exists(), "an empty file is never written"
    assert not (tmp_path / "parquet/rejects").exists()


texts = st.text(max_size=30) | st.none()
tables = st.lists(
    st.fixed_dictionaries(
        {"text": texts, "ids": st.lists(st.integers(0, 9), max_size=4) | st.none(), "n": st.integers(0, 9)}
    ),
    max_size=40,
)


@given(tables, st.lists(st.integers(0, 40), max_size=6), st.integers(1, 9), st.integers(40, 400))
def test_row_groups_are_cut_by_the_rows_and_not_by_the_tables_they_came_in(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    cuts: list[int],
    max_rows: int,
    max_bytes: int,
):
    schema = pa.schema([("text", pa.string()), ("ids", pa.list_(pa.int32())), ("n", pa.int32())])
    table = pa.Table.from_pylist(rows, schema=schema)
    folder = tmp_path_factory.mktemp("groups", numbered=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.parquet_files.MAX_GROUP_BYTES", max_bytes)
        with GroupedWriter(folder / "whole", schema, max_rows) as writer:
            writer.write(table)
        with GroupedWriter(folder / "cut", schema, max_rows) as writer:
            bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
            for start, stop in itertools.pairwise(bounds):
                writer.write(table.slice(start, stop - start))
    assert (folder / "whole").read_bytes() == (folder / "cut").read_bytes()
    assert pq.read_table(folder / "cut").equals(table)
    meta = pq.ParquetFile(folder / "cut").metadata
    groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    sizes = row_sizes(table)
    start = 0
    for length in groups:
        assert length <= max_rows
        assert sizes[start : start + length - 1].sum() < max_bytes, "it was full before its last row"
        start += length


def test_a_group_of_many_pieces_is_written_in_one(tmp_path: Path):
    """More rows than a page holds: where the pieces met must not show in the pages."""
    table = pa.table({"text": ["x" * (i % 300) + str(i) for i in range(12_000)]})
    write_table(tmp_path / "whole", table)
    with GroupedWriter(tmp_path / "cut", table.schema) as writer:
        for start in range(0, table.num_rows, 347):
            writer.write(table.slice(start, 347))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()
    assert pq.ParquetFile(tmp_path / "cut").metadata.num_row_groups == 2


def test_row_sizes_follow_the_values():
    columns = {
        "s": pa.array(["", None, "abc"]),
        "b": pa.array([b"12", None, b""]),
        "l": pa.array([[1, 2], [], None], pa.list_(pa.int32())),
        "f": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)),
        "deep": pa.array([[["a"]], None, []], pa.list_(pa.list_(pa.string()))),
        "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())),
        "struct": pa.array([{"x": "yz"}, None, {"x": None}], pa.struct([("x", pa.string())])),
        "n": pa.array([1, None, 3]),
    }
    table = pa.table(columns)
    whole = row_sizes(table)
    assert whole.tolist() == [0 + 2 + 16 + 16 + 160 + 160 + 2 + 8, 160 + 8, 3 + 0 + 0 + 16 + 0 + 160 + 0 + 8]
    pieces = [row_sizes(table.slice(i, 1)) for i in range(3)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    assert row_sizes(table.slice(0, 0)).tolist() == []


def test_rows_that_do_not_add_up_are_an_error(tmp_path: Path):
    with open_ledger(LocalStorage(tmp_path / "out"), tmp_path / "spool") as ledger:
        pass
    work(LocalStorage(tmp_path / "out"), tmp_path / "spool")
    with open_ledger(LocalStorage(tmp_path / "out"), tmp_path / "spool") as ledger:
        committed = ledger.committed(0)
    state = RunState(LocalStorage(tmp_path / "out"), ledger.fingerprint)
    finaliser = Finaliser(state, small_plan(), tmp_path / "spool", merge_counts)
    with pytest.raises(OutputError, match="chunks missing"):
        finaliser.finalise(0, {chunk: committed[chunk] for chunk in (0, 2)})
    wrong = dataclasses.replace(committed[1], counts={**committed[1].counts, "ok": 3})
    with pytest.raises(
        OutputError, match=r"shard 0 \(in-0\) does not add up: 7 rows in, but 7 ok \+ 1 rejected"
    ):
        finaliser.finalise(0, {**committed, 1: wrong})
    check_balance({"rows": 3, "ok": 1, "rejected": 1, "duplicates": 1}, 3, "it")


def test_a_chunk_that_holds_other_rows_than_it_says_is_an_error(tmp_path: Path):
    work(LocalStorage(tmp_path / "out"), tmp_path / "spool")
    with open_ledger(LocalStorage(tmp_path / "out"), tmp_path / "spool") as ledger:
        committed = ledger.committed(0)
        state = RunState(ledger.storage, ledger.fingerprint)
        wrong = dataclasses.replace(committed[1], counts={**committed[1].counts, "samples": 9})
        finaliser = Finaliser(state, ledger.plan, tmp_path / "spool", merge_counts)
        with pytest.raises(OutputError, match="would hold 9 rows and 16 were committed"):
            finaliser.finalise(0, {**committed, 1: wrong})
    assert not list((tmp_path / "spool").glob("*"))


def test_a_foreign_file_of_the_final_name_is_not_touched(tmp_path: Path):
    output = tmp_path / "out"
    with open_ledger(LocalStorage(output), tmp_path / "spool"):
        (output / "data").mkdir()
        (output / "data/part-00000-of-00002.parquet").write_bytes(b"mine")
    with pytest.raises(OutputError, match="is not what the committed chunks make"):
        work(LocalStorage(output), tmp_path / "spool")
    assert (output / "data/part-00000-of-00002.parquet").read_bytes() == b"mine"
    (output / "data/part-00000-of-00002.parquet").unlink()
    assert work(LocalStorage(output), tmp_path / "spool") is not None
    assert results(output) == undisturbed(tmp_path)


def test_a_line_of_json_is_valid_json():
    line = json_line({"a": math.nan, "b": [math.inf, 1.5], "c": b"\x00", "d": {"e": "é\n"}})
    assert line.endswith("\n")
    assert "\n" not in line[:-1]
    assert json.loads(line) == {"a": None, "b": [None, 1.5], "c": "AA==", "d": {"e": "é\n"}}
