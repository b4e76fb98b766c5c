"""Which files are shards, in which order, under which names and versions."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from engine.errors import ConfigError, InputError, MissingExtraError, RetryLater
from pipeline.input_files import errors_named
from pipeline.rows import SourceRow
from pipeline.shards import (
    InputSettings,
    check_columns,
    count_rows,
    current_version,
    list_shards,
    read_rows,
)
from tests.pipeline.input_helpers import lines, write_jsonl, write_parquet

ROWS = [{"prompt": f"p{i}"} for i in range(3)]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "data"
    write_parquet(root / "b.parquet", ROWS)
    write_parquet(root / "nested" / "a.PARQUET", ROWS)
    write_jsonl(root / "a.jsonl", lines(ROWS))
    write_jsonl(root / "c.jsonl.gz", lines(ROWS))
    write_jsonl(root / "d.ndjson.zst", lines(ROWS))
    (root / "README.md").write_text("about")
    for hidden in ("_SUCCESS", ".b.parquet.crc", "_state/x.parquet", ".cache/y.jsonl"):
        write_jsonl(root / hidden, b"not data")
    return root


def names(path, **options) -> list[str]:
    return [shard.name for shard in list_shards(InputSettings(path=path, **options))]


def test_a_folder_means_its_data_files_sorted_by_name(folder):
    shards = list_shards(InputSettings(path=str(folder)))
    assert [(shard.index, shard.name, shard.format) for shard in shards] == [
        (0, "a.jsonl", "jsonl"),
        (1, "b.parquet", "parquet"),
        (2, "c.jsonl.gz", "jsonl"),
        (3, "d.ndjson.zst", "jsonl"),
        (4, "nested/a.PARQUET", "parquet"),
    ]
    assert [shard.num_bytes for shard in shards] == [(folder / shard.name).stat().st_size for shard in shards]
    for shard in shards:
        rows = list(read_rows(shard, InputSettings(path=str(folder))))
        assert [row.columns for row in rows if isinstance(row, SourceRow)] == ROWS
        assert {row.shard_index for row in rows} == {shard.index}
        assert count_rows(shard) == 3


def test_a_format_narrows_a_folder_and_decides_for_a_file(folder):
    assert names(str(folder), format="parquet") == ["b.parquet", "nested/a.PARQUET"]
    odd = write_jsonl(folder / "rows.txt", lines(ROWS))
    with pytest.raises(InputError, match=r"rows\.txt: its extension names no format"):
        names(str(odd))
    assert names(str(odd), format="jsonl") == ["rows.txt"]
    write_jsonl(folder / "e.json", lines(ROWS))
    assert "e.json" not in names(str(folder))
    assert "e.json" in names(str(folder), format="jsonl")


def test_files_globs_and_lists(folder):
    root = str(folder)
    assert names(f"{root}/b.parquet") == ["b.parquet"]
    assert names(f"{root}/*.parquet") == ["b.parquet"]
    assert names(f"{root}/**/*.[pP]*") == ["b.parquet", "nested/a.PARQUET"]
    assert names(f"file://{root}/a.jsonl") == ["a.jsonl"]
    assert names([f"{root}/nested", f"{root}/a.jsonl"]) == ["a.jsonl", "nested/a.PARQUET"]
    assert names([f"{root}/a.jsonl", f"{root}/*.jsonl", root]) == names(root)  # each file once


def test_a_bracket_in_a_name_is_no_glob_when_the_file_is_there(tmp_path):
    write_jsonl(tmp_path / "a[1].jsonl", lines(ROWS))
    write_jsonl(tmp_path / "a1.jsonl", lines(ROWS))
    assert names(str(tmp_path / "a[1].jsonl")) == ["a[1].jsonl"]
    assert names(str(tmp_path / "a[12].jsonl")) == ["a1.jsonl"]


def test_names_and_order_do_not_depend_on_where_the_data_lies(folder, tmp_path):
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(folder, moved)
    assert names(str(moved)) == names(str(folder))
    assert names(f"{moved}/**/*.parquet") == names(f"{folder}/**/*.parquet")
    assert names([f"{moved}/nested", f"{moved}/a.jsonl"]) == names([f"{folder}/nested", f"{folder}/a.jsonl"])


def test_a_relative_path_is_the_same_input(folder, monkeypatch):
    expected = list_shards(InputSettings(path=str(folder)))
    monkeypatch.chdir(folder.parent)
    assert list_shards(InputSettings(path="data/")) == expected
    assert list_shards(InputSettings(path="./data")) == expected


def test_remote_files_have_the_same_names_and_rows(folder):
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/shards-test/", recursive=True)
    try:
        settings = InputSettings(path="memory://shards-test")
        shards = list_shards(settings)
        assert [shard.name for shard in shards] == names(str(folder))
        assert all(shard.url.startswith("memory://") for shard in shards)
        for shard in shards:
            assert [row.columns for row in read_rows(shard, settings) if isinstance(row, SourceRow)] == ROWS
            assert current_version(shard) == shard.version
        memory.pipe("/shards-test/a.jsonl", lines([{"prompt": "pX"}] * 3))
        assert current_version(shards[0]) != shards[0].version
        mixed = names(["memory://shards-test/b.parquet", f"{folder}/b.parquet"])
        assert mixed == ["file/b.parquet", "memory/b.parquet"]
    finally:
        memory.rm("/shards-test", recursive=True)


def test_versions_are_json_and_change_with_the_content(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", lines([{"prompt": "x" * 100}] * 2000))
    [shard] = list_shards(InputSettings(path=str(path)))
    assert json.loads(json.dumps(shard.version)) == shard.version
    assert current_version(shard) == shard.version
    stat = path.stat()
    for offset in (20, stat.st_size - 20):  # both ends, with size, inode and times as they were
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        before = current_version(shard)
        path.write_bytes(bytes(content))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert current_version(shard) != before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert current_version(shard)["mtime_ns"] == stat.st_mtime_ns + 1
    path.unlink()
    with pytest.raises(InputError, match=r"a\.jsonl: no such file"):
        current_version(shard)
    with pytest.raises(InputError, match=r"a\.jsonl: no such file"):
        list(read_rows(shard, InputSettings(path=str(path))))


def test_an_input_that_matches_nothing_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.csv").write_text("a,b")
    for path, says in [
        (str(tmp_path / "absent.jsonl"), "no such file"),
        (str(tmp_path / "*.jsonl"), "matches no file"),
        (str(tmp_path / "empty"), "matches no file"),
        (str(tmp_path / "other"), r"no Parquet or JSONL file among its 1 files \(such as a\.csv\)"),
        ([str(tmp_path / "other"), str(tmp_path / "absent")], "no Parquet or JSONL"),
        ("memory://nothing-here/a.jsonl", "no such file"),
    ]:
        with pytest.raises(InputError, match=says) as caught:
            list_shards(InputSettings(path=path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "simplecache::s3://bucket/a.jsonl",
        "zip://a.jsonl::/data/a.zip",
        "github://owner:repo@main/a.jsonl",
        "reference://x",
        "python://os.system",
        "FTP://host/a.jsonl",
        "data:text://x",
    ],
)
def test_urls_off_the_list_are_never_opened(url):
    with pytest.raises(ConfigError, match=r"not opened"):
        list_shards(InputSettings(path=url))


def test_a_missing_driver_names_its_extra(monkeypatch):
    def absent(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'tidemill\[s3\]'"):
        list_shards(InputSettings(path="s3://bucket/a.jsonl"))
    with pytest.raises(ConfigError, match="pip install adlfs"):
        list_shards(InputSettings(path="az://box/a.jsonl"))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (TimeoutError("slow"), RetryLater),
        (OSError(5, "Input/output error"), RetryLater),
        (ConnectionResetError(104, "reset by peer"), RetryLater),
        (PermissionError(13, "no"), InputError),
        (OSError("Corrupt snappy compressed data."), InputError),
    ],
)
def test_passing_faults_ask_for_another_try_and_the_rest_do_not(fault, kind):
    with pytest.raises(kind, match="the-file") as caught, errors_named("the-file"):
        raise fault
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": []}, "input.path"),
        ({"path": ""}, "input.path"),
        ({"path": "x", "max_line_bytes": 0}, "input.max_line_bytes"),
        ({"path": "x", "max_json_depth": 1000}, "input.max_json_depth"),
        ({"path": "x", "max_decoded_bytes": -1}, "input.max_decoded_bytes"),
        ({"path": "x", "rows_per_shard": 0}, "input.rows_per_shard"),
        ({"path": "x", "carry_columns": ("a", "b", "a")}, "'a' twice"),
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict[str, Any], says):
    with pytest.raises(ConfigError, match=says):
        InputSettings(**options)


def test_settings_of_datasets_are_not_ignored_for_files(folder):
    options: list[dict[str, Any]] = [{"split": "train"}, {"revision": "abc"}]
    for option in options:
        with pytest.raises(ConfigError, match=f"input.{next(iter(option))}="):
            list_shards(InputSettings(path=str(folder), **option))


def test_a_column_no_file_has_is_found_before_the_run(folder):
    shards = list_shards(InputSettings(path=str(folder)))
    check_columns(shards, ("prompt",))
    with pytest.raises(InputError, match=r"b\.parquet: no column 'promt'; did you mean 'prompt'\?"):
        check_columns(shards, ("promt",))
    jsonl_only = [shard for shard in shards if shard.format == "jsonl"]
    check_columns(jsonl_only, ("promt",))  # any line may have it


def test_a_range_that_is_none_is_a_programming_error(folder):
    shard = list_shards(InputSettings(path=str(folder)))[0]
    for start, stop in ((-1, None), (3, 2)):
        with pytest.raises(ValueError, match="are no range"):
            read_rows(shard, InputSettings(path="x"), start, stop)


def test_shards_survive_json(folder):
    for shard in list_shards(InputSettings(path=str(folder))):
        stored = json.loads(json.dumps(dataclasses.asdict(shard)))
        assert type(shard)(**stored) == shard
