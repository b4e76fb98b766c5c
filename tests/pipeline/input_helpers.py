"""What the input side's tests share: files of each format, and a byte-level tokenizer for chats."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from transformers import PreTrainedTokenizerFast

from pipeline.rows import Reject, SourceRow
from pipeline.shards import InputSettings, Shard, list_shards, read_rows
from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer


def make_chat_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def lines(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_jsonl(path: Path, content: bytes) -> Path:
    """Compressed as the name's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif path.suffix == ".zst":
        content = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    path.write_bytes(content)
    return path


def write_parquet(
    path: Path, rows: Sequence[dict[str, Any]], row_group_size: int = 10, **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size, **options)
    return path


def one_shard(path: Path, **options: Any) -> tuple[Shard, InputSettings]:
    settings = InputSettings(path=str(path), **options)
    [shard] = list_shards(settings)
    return shard, settings


def read_all(path: Path, **options: Any) -> list[SourceRow | Reject]:
    shard, settings = one_shard(path, **options)
    return list(read_rows(shard, settings))
