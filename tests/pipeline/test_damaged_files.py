"""Whatever bytes a file holds, each row is read or rejected with a reason, or the file is refused by name.

TIDEMILL_FUZZ_EXAMPLES sets how many damaged files are tried (120; 54,000 take ten minutes), and
TIDEMILL_FOREIGN_FILES names a folder whose Parquet files, at any depth, are read too, such as a copy of
apache/parquet-testing.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import gzip
import os
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from pipeline.rows import REASONS, Reject, SourceRow
from pipeline.shards import InputSettings, Shard, count_rows, read_rows
from tests.pipeline.input_helpers import lines

EXAMPLES = int(os.environ.get("TIDEMILL_FUZZ_EXAMPLES", "120"))
FOREIGN = os.environ.get("TIDEMILL_FOREIGN_FILES")

TABLE = pa.table(
    {
        "id": pa.array(range(40), pa.int64()),
        "prompt": [None if i % 7 == 3 else f"prompt {i} é😀" for i in range(40)],
        "messages": [[{"role": "user", "content": f"hello {i}"}] * (i % 3) for i in range(40)],
        "price": [decimal.Decimal(i) / 4 for i in range(40)],
        "when": [datetime.datetime(2026, 1, 1) + datetime.timedelta(hours=i) for i in range(40)],
        "tokens": pa.array([list(range(i % 5)) for i in range(40)], pa.list_(pa.int32())),
    }
)
PARQUET = [
    {"compression": "none", "use_dictionary": False},
    {"compression": "snappy"},
    {"compression": "zstd", "data_page_version": "2.0", "write_page_checksum": True},
    {"compression": "gzip", "use_dictionary": False, "column_encoding": {"id": "DELTA_BINARY_PACKED"}},
]
JSONL = lines({"prompt": f"p{i}", "id": i} for i in range(40))
COMPRESSED = {
    "gz": gzip.compress(JSONL, mtime=0),
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress(JSONL),
}


def outcome(path: Path, file_format: Literal["parquet", "jsonl"]) -> str:
    """What came of a file: "whole", "rejects" or "refused", and nothing else may."""
    shard = Shard(index=0, name=path.name, url=str(path), format=file_format, num_bytes=0, version={})
    input_settings = InputSettings(path=str(path))
    refused = None
    try:
        rows = list(read_rows(shard, input_settings))
        number = count_rows(shard)
    except InputError as error:
        rows, number, refused = [], 0, str(error)
    if refused is not None:
        assert str(path) in refused
        return "refused"
    assert [row.position for row in rows] == list(range(number))
    for row in rows:
        assert isinstance(row, SourceRow) or row.reason in REASONS
    return "rejects" if any(isinstance(row, Reject) for row in rows) else "whole"


# A place as a share of the file, the end counted more often (a Parquet file's footer is there), and what is
# put there: bytes of other values, or nothing, which cuts the file short.
damage = st.tuples(
    st.floats(0, 1) | st.floats(0.7, 1), st.none() | st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 9)
)


def damaged(content: bytes, damages: list[tuple[float, bytes | None]]) -> bytes:
    found = bytearray(content)
    for share, put in damages:
        at = int(share * len(found))
        if put is None:
            del found[at:]
        else:
            found[at : at + len(put)] = put
    return bytes(found)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path = tmp_path_factory.mktemp("whole") / "a.parquet"
    contents = []
    for options in PARQUET:
        pq.write_table(TABLE, path, row_group_size=13, **options)
        assert outcome(path, "parquet") == "whole"
        contents.append(path.read_bytes())
    return contents


@settings(deadline=None, max_examples=EXAMPLES)
@given(which=st.integers(0, len(PARQUET) - 1), damages=st.lists(damage, min_size=1, max_size=3))
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path_factory, written, which, damages):
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    path.write_bytes(damaged(written[which], damages))
    outcome(path, "parquet")


@settings(deadline=None, max_examples=EXAMPLES)
@given(suffix=st.sampled_from(sorted(COMPRESSED)), damages=st.lists(damage, min_size=1, max_size=3))
def test_a_damaged_compressed_file_is_read_or_refused(tmp_path_factory, suffix, damages):
    path = tmp_path_factory.getbasetemp() / f"damaged.jsonl.{suffix}"
    content = damaged(COMPRESSED[suffix], damages)
    path.write_bytes(content)
    found = outcome(path, "jsonl")
    if len(content) < len(COMPRESSED[suffix]) and content:
        assert found == "refused", "a file that is cut short is never taken for a whole one"


@pytest.mark.skipif(FOREIGN is None, reason="TIDEMILL_FOREIGN_FILES names no folder")
def test_files_of_others_are_read_or_refused():
    assert FOREIGN is not None
    paths = [path for path in sorted(Path(FOREIGN).rglob("*.parquet*")) if path.suffix != ".md"]
    counts = collections.Counter(outcome(path, "parquet") for path in paths)
    print(f"\n{len(paths)} files of {FOREIGN}: {dict(counts)}")
    assert counts["whole"] > 0
