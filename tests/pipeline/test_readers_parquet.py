"""Parquet: rows by position from any start, few of them in memory, and damaged files refused by name."""

from __future__ import annotations

import datetime
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from pipeline.rows import Reject, SourceRow
from pipeline.shards import count_rows, read_rows
from tests.pipeline.input_helpers import one_shard, read_all, write_parquet


def some_rows(num_rows: int) -> list[dict]:
    return [
        {
            "id": i,
            "prompt": None if i % 7 == 3 else f"prompt {i} é😀",
            "messages": [{"role": "user", "content": f"hello {i}"}] * (i % 3),
            "sampling": {"temperature": 0.5, "seed": i if i % 2 else None},
        }
        for i in range(num_rows)
    ]


@pytest.mark.parametrize("row_group_size", [1, 5, 8, 13, 100])
def test_every_split_point_reads_the_same_rows(tmp_path, row_group_size):
    expected = some_rows(29)
    shard, input_settings = one_shard(write_parquet(tmp_path / "a.parquet", expected, row_group_size))
    rows = list(read_rows(shard, input_settings))
    assert [row.columns for row in rows if isinstance(row, SourceRow)] == expected
    assert [row.position for row in rows] == list(range(29))
    assert count_rows(shard) == 29
    for k in range(31):
        assert list(read_rows(shard, input_settings, 0, k)) == rows[:k]
        assert list(read_rows(shard, input_settings, k)) == rows[k:]
        assert list(read_rows(shard, input_settings, k, k + 9)) == rows[k : k + 9]


@settings(deadline=None, max_examples=25)
@given(
    num_rows=st.integers(0, 40), group=st.integers(1, 17), start=st.integers(0, 45), length=st.integers(0, 45)
)
def test_a_range_is_a_slice_of_the_whole(tmp_path_factory, num_rows, group, start, length):
    path = tmp_path_factory.getbasetemp() / "range.parquet"
    table = pa.table({"prompt": pa.array([str(i) for i in range(num_rows)], pa.string())})
    pq.write_table(table, path, row_group_size=group)
    shard, input_settings = one_shard(path)
    found = [row.position for row in read_rows(shard, input_settings, start, start + length)]
    assert found == list(range(num_rows))[start : start + length]
    assert count_rows(shard) == num_rows


def test_only_the_columns_asked_for_are_decoded(tmp_path):
    """The other column's pages are overwritten with noise, and nobody notices."""
    rows = [{"prompt": f"p{i}", "other": f"{i}" * 50} for i in range(40)]
    path = write_parquet(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    assert chunk.path_in_schema == "other"
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 200] = b"\xff" * 200
    path.write_bytes(bytes(content))
    shard, input_settings = one_shard(path)
    found = list(read_rows(shard, input_settings, columns=("prompt", "absent")))
    assert [row.columns for row in found if isinstance(row, SourceRow)] == [
        {"prompt": f"p{i}"} for i in range(40)
    ]
    with pytest.raises(InputError, match=r"a\.parquet: damaged or cut short"):
        list(read_rows(shard, input_settings))


def test_row_groups_before_the_start_are_not_decoded(tmp_path):
    rows = [{"prompt": f"p{i}"} for i in range(40)]
    path = write_parquet(tmp_path / "a.parquet", rows, 10, compression="none", use_dictionary=False)
    offset = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 30] = b"\xff" * 30
    path.write_bytes(bytes(content))
    shard, input_settings = one_shard(path)
    assert [row.position for row in read_rows(shard, input_settings, 10)] == list(range(10, 40))
    with pytest.raises(InputError):
        list(read_rows(shard, input_settings, 9))


def test_a_row_without_any_column_asked_for_is_still_a_row(tmp_path):
    shard, input_settings = one_shard(write_parquet(tmp_path / "a.parquet", some_rows(12), 5))
    rows = list(read_rows(shard, input_settings, 3, 8, columns=("absent",)))
    assert [(row.position, row.columns) for row in rows if isinstance(row, SourceRow)] == [
        (i, {}) for i in range(3, 8)
    ]


def test_a_dotted_name_is_one_column_not_a_path(tmp_path):
    rows = [{"a.b": "flat", "a": {"b": "nested", "c": 1}}]
    shard, input_settings = one_shard(write_parquet(tmp_path / "x.parquet", rows))
    for names in (("a.b",), ("a",), ("a", "a.b")):
        [row] = read_rows(shard, input_settings, columns=names)
        assert isinstance(row, SourceRow)
        assert row.columns == {name: rows[0][name] for name in names}


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"]), path)
    with pytest.raises(InputError, match="two columns are named 'prompt'"):
        read_all(path)


def test_bytes_that_are_no_text_reject_their_row_alone(tmp_path):
    bad = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": bad}), path)
    first, reject, last = read_all(path)
    assert isinstance(reject, Reject)
    assert (reject.reason, reject.position) == ("not_utf8", 1)
    assert reject.message.startswith("a.parquet row 1: column 'prompt'")
    assert isinstance(first, SourceRow)
    assert isinstance(last, SourceRow)
    assert (first.columns["prompt"], last.columns["prompt"]) == ("good", "fine")


def test_values_of_every_type_are_plain_or_rejected(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "day": pa.array([0, 2**31 - 1], pa.int32()).view(pa.date32()),  # the second is past the year 9999
            "tags": pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string())),
            "words": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    pq.write_table(table, path)
    row, reject = read_all(path)
    assert isinstance(row, SourceRow)
    assert row.columns == {"day": datetime.date(1970, 1, 1), "tags": [("k", "v")], "words": "a"}
    assert isinstance(reject, Reject)
    assert reject.reason == "wrong_type"
    assert "'day'" in reject.message


@pytest.mark.parametrize("nested", [False, True])
def test_a_few_bytes_that_stand_for_200_megabytes_are_read_in_bounded_memory(tmp_path, nested):
    value = "x" * 1_000_000
    prompt = [{"role": "user", "content": value}] if nested else value
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": prompt}] * 200, 200, compression="zstd")
    assert path.stat().st_size < 2_000
    pool = pa.default_memory_pool()
    shard, input_settings = one_shard(path)
    pool.release_unused()
    before = pool.bytes_allocated()
    peak = num_rows = 0
    for row in read_rows(shard, input_settings):
        assert isinstance(row, SourceRow)
        num_rows += 1
        peak = max(peak, pool.bytes_allocated() - before)
    assert num_rows == 200
    assert peak < 32 * 2**20


def test_a_file_of_many_rows_streams(tmp_path):
    """40 MB in one row group; buffers, not row groups, are what is held."""
    rows = [{"prompt": f"{i:08d}" * 500} for i in range(10_000)]
    path = write_parquet(
        tmp_path / "a.parquet",
        rows,
        10_000,
        compression="none",
        use_dictionary=False,
        data_page_size=64 * 1024,
    )
    assert path.stat().st_size > 35 * 2**20
    del rows
    pool = pa.default_memory_pool()
    shard, input_settings = one_shard(path)
    before = pool.bytes_allocated()
    peak = num_rows = 0
    tracemalloc.start()  # what is read from the file is Python's, what is decoded is Arrow's
    try:
        for _ in read_rows(shard, input_settings):
            num_rows += 1
            peak = max(peak, pool.bytes_allocated() - before)
        peak_read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_rows == 10_000
    assert peak < 8 * 2**20
    assert peak_read < 8 * 2**20


def test_a_row_past_the_cap_is_rejected_and_its_neighbours_are_not(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b" * 5000}, {"prompt": "c"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    found = read_all(path, max_decoded_bytes=1000)
    assert [row.reason if isinstance(row, Reject) else "ok" for row in found] == ["ok", "row_too_large", "ok"]


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": f"p{i}"} for i in range(20)], 7)
    content = path.read_bytes()
    for k in range(0, len(content), 3):
        path.write_bytes(content[:k])
        shard, input_settings = one_shard(path)
        with pytest.raises(InputError, match=r"a\.parquet: damaged or cut short"):
            count_rows(shard)
        with pytest.raises(InputError, match=r"a\.parquet"):
            list(read_rows(shard, input_settings))


def test_damaged_pages_are_an_error_or_the_same_number_of_rows(tmp_path):
    """Parquet has no check sums by default, so a value may change; the file never ends early."""
    path = write_parquet(
        tmp_path / "a.parquet", [{"prompt": f"p{i}"} for i in range(20)], 7, compression="snappy"
    )
    content = path.read_bytes()
    refusals = []
    for k in range(4, len(content) - 8, 5):
        flipped = bytearray(content)
        flipped[k] ^= 0xFF
        path.write_bytes(bytes(flipped))
        shard, input_settings = one_shard(path)
        try:
            num_rows = count_rows(shard)
            rows = list(read_rows(shard, input_settings))
        except InputError as error:
            refusals.append(str(error))
        else:
            assert [row.position for row in rows] == list(range(num_rows))
    assert len(refusals) > 20
    assert all("a.parquet" in refusal and "\n" not in refusal for refusal in refusals)


def test_an_empty_file_and_a_text_file_are_no_parquet(tmp_path):
    for content in (b"", b"PAR1", b'{"prompt": "a"}\n' * 100):
        path = Path(tmp_path / "a.parquet")
        path.write_bytes(content)
        shard, _ = one_shard(path)
        with pytest.raises(InputError, match=r"a\.parquet: damaged"):
            count_rows(shard)
