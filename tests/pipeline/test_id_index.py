"""Repeated ids: the first row in (shard, position) order owns one, whatever is asked first."""

from __future__ import annotations

import sqlite3
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from pipeline.id_index import IdIndex
from pipeline.shards import InputSettings, list_shards
from tests.pipeline.input_helpers import lines, write_jsonl, write_parquet


@settings(deadline=None, max_examples=20)
@given(
    ids=st.lists(
        st.lists(st.sampled_from(["a", "b", "é", 1, "1", None, True, ""]), max_size=6), min_size=1, max_size=3
    )
)
def test_exactly_the_later_rows_of_an_id_have_a_first(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("ids")
    for i, shard_ids in enumerate(ids):
        write_jsonl(folder / f"{i}.jsonl", lines({"id": row_id} for row_id in shard_ids))
    input_settings = InputSettings(path=str(folder), id_column="id")
    seen: dict[str, tuple[int, int]] = {}
    with IdIndex.build(folder / "ids.sqlite", list_shards(input_settings), input_settings) as index:
        for shard, shard_ids in enumerate(ids):
            for position, value in enumerate(shard_ids):
                if value in (None, "") or value is True:
                    continue  # no id; rejected with its own reason
                first = seen.setdefault(str(value), (shard, position))
                expected = None if first == (shard, position) else first
                assert index.first_of(str(value), shard, position) == expected
        counts = Counter(
            str(v) for shard_ids in ids for v in shard_ids if v not in (None, "") and v is not True
        )
        assert index.num_duplicates == sum(n - 1 for n in counts.values())
        assert index.first_of("never seen", 0, 0) is None


def test_rows_that_cannot_be_read_own_nothing(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", b'not json\n{"prompt": "no id"}\n{"id": "x"}\n')
    write_parquet(tmp_path / "b.parquet", [{"id": "y"}, {"id": "x"}, {"id": None}])
    write_parquet(tmp_path / "c.parquet", [{"other": 1}])
    input_settings = InputSettings(path=str(tmp_path), id_column="id")
    with IdIndex.build(tmp_path / "ids.sqlite", list_shards(input_settings), input_settings) as index:
        assert index.first_of("x", 0, 2) is None
        assert index.first_of("x", 1, 1) == (0, 2)
        assert index.num_duplicates == 1


def test_building_again_replaces_and_a_damaged_shard_leaves_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", lines([{"id": "x"}, {"id": "x"}]))
    input_settings = InputSettings(path=str(path), id_column="id")
    index_path = tmp_path / "ids.sqlite"
    with IdIndex.build(index_path, list_shards(input_settings), input_settings) as index:
        assert index.num_duplicates == 1
    write_jsonl(path, lines([{"id": "x"}, {"id": "y"}]))
    with IdIndex.build(index_path, list_shards(input_settings), input_settings) as index:
        assert index.num_duplicates == 0
    bad = tmp_path / "b.jsonl.gz"
    bad.write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"b\.jsonl\.gz"):
        IdIndex.build(tmp_path / "new.sqlite", list_shards(InputSettings(path=str(bad))), input_settings)
    assert not (tmp_path / "new.sqlite").exists()


def test_only_repeated_ids_are_kept(tmp_path):
    rows = [{"id": i} for i in range(20_000)] + [{"id": 5}]
    path = write_jsonl(tmp_path / "a.jsonl", lines(rows))
    input_settings = InputSettings(path=str(path), id_column="id")
    with IdIndex.build(tmp_path / "ids.sqlite", list_shards(input_settings), input_settings) as index:
        assert index.first_of("5", 0, 20_000) == (0, 5)
        assert index.num_duplicates == 1
    assert (tmp_path / "ids.sqlite").stat().st_size < 32_768
    with sqlite3.connect(tmp_path / "ids.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM repeated").fetchone() == (1,)
    db.close()
