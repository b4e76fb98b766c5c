"""JSONL: what is a row, what is a reject, and what is a damaged file."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from pipeline.readers import jsonl
from pipeline.rows import REASONS, Reject, SourceRow
from pipeline.shards import InputSettings, Shard, count_rows, read_rows
from tests.pipeline.input_helpers import lines, one_shard, read_all, write_jsonl

SUFFIXES = ["", ".gz", ".zst"]


def reasons(path: Path, **options) -> list[str]:
    return [row.reason if isinstance(row, Reject) else "ok" for row in read_all(path, **options)]


def prompts(rows) -> list[str]:
    assert all(isinstance(row, SourceRow) for row in rows), rows
    return [row.columns["prompt"] for row in rows]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_split_point_reads_the_same_rows(tmp_path, suffix):
    content = (
        b'\xef\xbb\xbf{"prompt": "a"}\r\n'
        b"\r\n  \t \n"
        b'{"prompt": "b"}\n'
        b"not json\n"
        b"\n"
        b'  {"prompt": "d"}  \n'
        b'{"prompt": "' + b"x" * 500 + b'"}\n'
        b'{"prompt": "\xff"}\n'
        b'{"prompt": "torn'
    )
    shard, input_settings = one_shard(write_jsonl(tmp_path / f"a.jsonl{suffix}", content), max_line_bytes=100)
    rows = list(read_rows(shard, input_settings))
    assert [row.position for row in rows] == list(range(7))
    assert [row.line for row in rows] == [1, 4, 5, 7, 8, 9, 10]
    found = [row.reason if isinstance(row, Reject) else row.columns["prompt"] for row in rows]
    assert found == ["a", "b", "not_json", "d", "line_too_long", "not_utf8", "not_json"]
    assert count_rows(shard) == 7
    for k in range(9):
        assert list(read_rows(shard, input_settings, 0, k)) == rows[:k]
        assert list(read_rows(shard, input_settings, k)) == rows[k:]
        for j in range(k, 9):
            assert list(read_rows(shard, input_settings, k, j)) == rows[k:j]


@pytest.mark.parametrize(
    ("line", "reason", "says"),
    [
        (b"{", "not_json", "not JSON at character"),
        (b"{'a': 1}", "not_json", "not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not_json", "Extra data"),
        (b'{"prompt": "a\x01"}', "not_json", "control character"),
        (b"[1, 2]", "wrong_type", "array"),
        (b'"text"', "wrong_type", "string"),
        (b"null", "wrong_type", "null"),
        (b"true", "wrong_type", "boolean"),
        (b"3", "wrong_type", "number"),
        (b'{"prompt": "\xc3("}', "not_utf8", "byte 13"),
        (b'{"prompt": "\xed\xa0\x80"}', "not_utf8", "UTF-8"),
        (b'{"prompt": "\\ud800"}', "lone_surrogate", "'prompt'"),
        (b'{"deep": [{"x": "a\\udfffb"}]}', "lone_surrogate", "'deep'"),
        (b'{"\\udc00": 1}', "lone_surrogate", "surrogate"),
        (b'{"prompt": NaN}', "bad_number", "NaN"),
        (b'{"prompt": -Infinity}', "bad_number", "-Infinity"),
        (b'{"prompt": 1e999}', "bad_number", "1e999"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "bad_number", "5000 digits"),
        (b'{"prompt": "a", "prompt": "b"}', "duplicate_key", "'prompt'"),
        (b'{"x": {"y": 1, "y": 1}}', "duplicate_key", "'y'"),
        (b"[" * 100_000, "too_deep", "64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "too_deep", "max_json_depth"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "not_json", "character 1"),
    ],
)
def test_a_bad_line_is_one_reject_and_the_rest_is_read(tmp_path, line, reason, says):
    path = write_jsonl(tmp_path / "a.jsonl", b'{"prompt": "before"}\n' + line + b'\n{"prompt": "after"}\n')
    first, bad, last = read_all(path)
    assert prompts([first, last]) == ["before", "after"]
    assert isinstance(bad, Reject)
    assert bad.reason == reason
    assert says in bad.message
    assert bad.message.startswith("a.jsonl line 2: ")
    assert "\n" not in bad.message
    assert (bad.position, bad.line, bad.source, bad.row_id) == (1, 2, "a.jsonl", None)
    assert bad.excerpt.isprintable()
    assert len(bad.excerpt) <= 200


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "\\ud83d\\ude00"}',  # a whole pair is one character
        b'{"prompt": "[[[[{{{{' + b"[" * 200 + b'"}',  # brackets in text nest nothing
        b'{"prompt": "\\\\\\"' + b"[" * 200 + b'\\\\"}',
        b'{"a":' * 64 + b"1" + b"}" * 64,
        b'{"prompt": ' + b"9" * 640 + b"}",
    ],
)
def test_what_looks_bad_and_is_not_is_read(tmp_path, line):
    [row] = read_all(write_jsonl(tmp_path / "a.jsonl", line))
    assert isinstance(row, SourceRow)
    assert row.columns == json.loads(line)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100 + b'"' + b'\\"' * 4_000_000,
        b"[" * 100 + b'"' + b"a\\\\" * 2_000_000 + b"\\",
        b'["' * 4_000_000,
        b'{"a":' * 1_600_000,
        b"[" * 100 + b'"\\ud800"' * 800_000,
        b'{"prompt": "' + b"\\ud800" * 1_300_000 + b'"}',
        b'{"prompt": ' + b"9" * 8_000_000 + b"}",
    ],
)
def test_no_line_takes_more_than_linear_time(tmp_path, line):
    """Each would take hours if the work were quadratic."""
    path = write_jsonl(tmp_path / "a.jsonl", line)
    start = time.process_time()
    [row] = read_all(path)
    assert isinstance(row, Reject)
    assert time.process_time() - start < 10


def test_only_the_columns_asked_for_are_kept_and_checked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", b'{"prompt": "a", "other": "\\ud800"}\n')
    shard, input_settings = one_shard(path)
    [row] = read_rows(shard, input_settings, columns=("prompt", "absent"))
    assert isinstance(row, SourceRow)
    assert row.columns == {"prompt": "a"}


def test_a_torn_last_line_says_so(tmp_path):
    [whole, torn] = read_all(write_jsonl(tmp_path / "a.jsonl", b'{"prompt": "a"}\n{"prompt": "b'))
    assert isinstance(torn, Reject)
    assert "cut short" in torn.message
    assert isinstance(whole, SourceRow)
    [only] = read_all(write_jsonl(tmp_path / "b.jsonl", b'{"prompt": "no line end"}'))
    assert prompts([only]) == ["no line end"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n\t"])
def test_a_file_without_rows_is_an_empty_shard(tmp_path, content):
    shard, input_settings = one_shard(write_jsonl(tmp_path / "a.jsonl", content))
    assert count_rows(shard) == 0
    assert list(read_rows(shard, input_settings)) == []


def test_the_cap_counts_the_line_without_its_end(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", b'{"p": 1}\n{"p": 12}\n')
    assert reasons(path, max_line_bytes=8) == ["ok", "line_too_long"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_line_of_half_a_gigabyte_is_skipped_in_bounded_memory(tmp_path, suffix):
    """A few kilobytes of gzip or zstd expand to it; plain, a sparse file does. NULs are no blanks."""
    path = tmp_path / f"a.jsonl{suffix}"
    size = 512 * 2**20 if suffix else 64 * 2**20
    if suffix == ".zst":
        with path.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as out:
            _write_bomb(out, size)
    elif suffix == ".gz":
        # Members may be joined, so one is enough to compress.
        member = gzip.compress(b"\0" * 2**20, 1)
        path.write_bytes(
            gzip.compress(b'{"prompt": "a"}\n')
            + member * (size // 2**20)
            + gzip.compress(b'\n{"prompt": "z"}\n')
        )
    else:
        with path.open("wb") as file:
            _write_bomb(file, size)
    shard, input_settings = one_shard(path, max_line_bytes=2**20)
    tracemalloc.start()
    try:
        rows = list(read_rows(shard, input_settings))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [type(row) for row in rows] == [SourceRow, Reject, SourceRow]
    assert isinstance(rows[1], Reject)
    assert rows[1].reason == "line_too_long"
    assert peak < 8 * 2**20


def _write_bomb(out, size: int) -> None:
    out.write(b'{"prompt": "a"}\n')
    for _ in range(size // 2**20):
        out.write(b"\0" * 2**20)
    out.write(b'\n{"prompt": "z"}\n')


def test_a_file_larger_than_the_cap_streams(tmp_path):
    """32 MB of rows, never more than a few reads of them at once."""
    row = lines([{"prompt": "x" * 8_000}])
    path = write_jsonl(tmp_path / "a.jsonl", row * 4_000)
    shard, input_settings = one_shard(path, max_line_bytes=10_000)
    tracemalloc.start()
    try:
        num_rows = sum(isinstance(row, SourceRow) for row in read_rows(shard, input_settings))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_rows == 4_000
    assert peak < 3 * 2**20


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_cut_anywhere_is_an_error_that_names_it(tmp_path, suffix):
    whole = write_jsonl(tmp_path / f"a.jsonl{suffix}", lines({"prompt": f"row {i}"} for i in range(50)))
    content = whole.read_bytes()
    for k in range(len(content)):
        whole.write_bytes(content[:k])
        shard, input_settings = one_shard(whole)
        with pytest.raises(InputError, match=rf"a\.jsonl{suffix}: damaged or cut short"):
            list(read_rows(shard, input_settings))
        with pytest.raises(InputError, match="damaged or cut short"):
            count_rows(shard)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_flipped_bit_never_changes_a_row(tmp_path, suffix):
    content = lines({"prompt": f"row {i}"} for i in range(50))
    whole = write_jsonl(tmp_path / f"a.jsonl{suffix}", content)
    packed = whole.read_bytes()
    expected = read_all(whole)
    num_refused = 0
    for k in range(len(packed)):
        flipped = bytearray(packed)
        flipped[k] ^= 0x10
        whole.write_bytes(bytes(flipped))
        try:
            rows = read_all(whole)
        except InputError:
            num_refused += 1
        else:
            assert rows == expected  # a bit of the header that means nothing
    assert num_refused > 0.9 * len(packed)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_members_and_frames_may_be_joined(tmp_path, suffix):
    first = write_jsonl(tmp_path / f"a{suffix}", lines([{"prompt": "a"}])).read_bytes()
    second = write_jsonl(tmp_path / f"b{suffix}", lines([{"prompt": "b"}])).read_bytes()
    joined = tmp_path / f"c.jsonl{suffix}"
    joined.write_bytes(first + second)
    assert prompts(read_all(joined)) == ["a", "b"]


def test_plain_text_named_gz_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b'{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: damaged"):
        read_all(path)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jsonl") / "a.jsonl"


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.dictionaries(st.text(), any_json, max_size=4), max_size=6), ascii_only=st.booleans())
def test_what_json_writes_is_read_back(scratch, rows, ascii_only):
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    scratch.write_bytes(text.encode())
    assert [row.columns for row in read_all(scratch) if isinstance(row, SourceRow)] == rows


STRUCTURE = [
    b"\n",
    b"\r\n",
    b" ",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b"\\u",
    b"d800",
    b":",
    b",",
    b"1",
    b"e9",
]
WORDS = [
    b"NaN",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xc3\xa9",
    b"\0",
    b'{"prompt": "a"}',
    b"null",
    b'"prompt"',
    b"\\udc00",
]
noise = st.sampled_from([*STRUCTURE, *WORDS])


@settings(deadline=None, max_examples=200)
@given(
    content=st.lists(noise | st.binary(max_size=4), max_size=24).map(b"".join),
    max_line_bytes=st.integers(1, 40),
    read_bytes=st.integers(1, 7),
    start=st.integers(0, 6),
    length=st.integers(0, 6),
)
def test_any_bytes_give_one_result_a_row(scratch, content, max_line_bytes, read_bytes, start, length):
    """Never an exception, never a position left out, and nothing depends on where reads happen to end."""
    scratch.write_bytes(content)
    shard = Shard(index=0, name="a.jsonl", url=str(scratch), format="jsonl", num_bytes=0, version={})
    input_settings = InputSettings(path=str(scratch), max_line_bytes=max_line_bytes)
    rows = list(read_rows(shard, input_settings))
    usual, jsonl.READ_BYTES = jsonl.READ_BYTES, read_bytes
    try:
        assert list(read_rows(shard, input_settings)) == rows
        assert count_rows(shard) == len(rows)
        assert list(read_rows(shard, input_settings, start, start + length)) == rows[start : start + length]
    finally:
        jsonl.READ_BYTES = usual
    assert [row.position for row in rows] == list(range(len(rows)))
    blank = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert len(rows) == sum(bool(line.strip(b" \t\r")) for line in blank)
    for row in rows:
        if isinstance(row, SourceRow):
            json.dumps(row.columns, ensure_ascii=False).encode()  # no lone surrogate comes through
        else:
            assert row.message.isprintable()
            assert row.reason in REASONS
