"""GGUF files that are refused: those that lie or end early, and models we do not have."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import checkpoints
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.gguf_model import GgufWeights, gguf_config
from engine.errors import ModelError
from tests.engine.gguf_maker import make_tiny_gguf

# Files that lie.


def header(*entries: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries) + b"".join(entries) + b"".join(tensors)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)


HUGE = (1 << 64) - 1
ALIGNMENT = entry("general.alignment", 4, struct.pack("<I", 32))
HOSTILE = {
    "nothing": b"",
    "half a magic": b"GG",
    "another format": b"PK\x03\x04" + bytes(100),
    "only a magic": b"GGUF",
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 99": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "tensor count": header(counts=(HUGE, 0)),
    "entry count": header(counts=(0, HUGE)),
    "entry count slightly over": header(ALIGNMENT, counts=(0, 9)),
    "key length": header(struct.pack("<Q", HUGE) + bytes(64)),
    "key past the format's limit": header(struct.pack("<Q", 70_000) + bytes(80_000)),
    "string length": header(entry("a", 8, struct.pack("<Q", 1 << 40))),
    "string not UTF-8": header(entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    "array count": header(entry("a", 9, struct.pack("<IQ", 5, 1 << 61))),
    "string array count": header(entry("a", 9, struct.pack("<IQ", 8, 1 << 58))),
    "array of arrays": header(entry("a", 9, struct.pack("<IQ", 9, 3) + bytes(64))),
    "unknown value type": header(entry("a", 77, bytes(16))),
    "unknown array type": header(entry("a", 9, struct.pack("<IQ", 77, 1) + bytes(16))),
    "key twice": header(ALIGNMENT, ALIGNMENT),
    "alignment not a power of two": header(entry("general.alignment", 4, struct.pack("<I", 12))),
    "alignment zero": header(entry("general.alignment", 4, struct.pack("<I", 0))),
    "alignment a text": header(entry("general.alignment", 8, text("32"))),
    "no dimensions": header(tensors=(text("t") + struct.pack("<IIQ", 0, 0, 0) + bytes(32),)),
    "many dimensions": header(tensors=(text("t") + struct.pack("<I", 1 << 30) + bytes(64),)),
    "dimension zero": header(tensors=(tensor("t", (0,)),)) + bytes(64),
    "dimension huge": header(tensors=(tensor("t", (1 << 62, 1 << 62)),)) + bytes(64),
    "product wraps to nothing": header(tensors=(tensor("t", (1 << 32, 1 << 32)),)) + bytes(64),
    "offset huge": header(tensors=(tensor("t", (4,), offset=1 << 63),)) + bytes(64),
    "offset unaligned": header(tensors=(tensor("t", (4,), offset=3),)) + bytes(64),
    "tensor a byte too long": header(tensors=(tensor("t", (16,)),)) + bytes(63 - 8),
    "tensor twice": header(tensors=(tensor("t", (1,)), tensor("t", (1,)))) + bytes(128),
    "half a block": header(tensors=(tensor("t", (31,), kind=8),)) + bytes(128),
    "unknown tensor type": header(tensors=(tensor("t", (4,), kind=99),)) + bytes(128),
    "a type we do not have": header(tensors=(tensor("t", (256,), kind=10),)) + bytes(128),
    "tensors past the end": header(tensors=(tensor("t", (1,)),), counts=(2, 0)) + bytes(33),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_line_and_allocates_nothing(case: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    with pytest.raises(ModelError) as caught:
        read_gguf_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert peak < 1_000_000


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = make_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    checkpoints.load_config(str(tmp_path / "whole.gguf"))
    cut = tmp_path / "cut.gguf"
    data_start = min(t.offset for t in read_gguf_header(tmp_path / "whole.gguf").tensors.values())
    points = {
        *range(0, 300),
        *range(300, data_start, 97),
        *range(data_start, len(whole), 9973),
        len(whole) - 1,
    }
    for point in sorted(points):
        cut.write_bytes(whole[:point])
        with pytest.raises(ModelError) as caught:
            read_gguf_header(cut)
        assert "\n" not in str(caught.value), point


@pytest.fixture(scope="module")
def shallow_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("shallow") / "tiny.gguf", num_hidden_layers=1)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_read_or_refused_but_never_crashes(data: st.DataObject, shallow_gguf: Path) -> None:
    """Whatever a header says, reading it gives a config and a tokenizer, or a ModelError on one line."""
    raw = bytearray(shallow_gguf.read_bytes())
    end = min(t.offset for t in read_gguf_header(shallow_gguf).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.sampled_from([0, 1, 2, 9, 0x7F, 0x80, 0xFF]))
    path = shallow_gguf.with_name("changed.gguf")
    path.write_bytes(bytes(raw))
    refusal = ""
    try:
        file = read_gguf_header(path)
        config = gguf_config(file)
        num_named = len(GgufWeights(file).shapes())
        checkpoints.load_tokenizer(str(path))
    except ModelError as error:
        refusal = str(error)
    else:
        assert config.num_layers > 0
        assert num_named == len(file.tensors)
    assert "\n" not in refusal


# Models we do not have.


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"general.architecture": "qwen2moe"}, "we have llama"),
        ({"llama.expert_count": 8}, "experts"),
        ({"split.count": 3}, "merge"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "yarn"),
        ({"llama.rope.dimension_count": 8}, "dimension_count"),
        ({"llama.attention.head_count_kv": 3}, "multiple"),
        ({"llama.attention.head_count_kv": [2, 1]}, "layer to layer"),
        ({"llama.block_count": 3}, "missing"),
        ({"llama.block_count": 1}, "has no place"),
        ({"llama.block_count": 4_000_000_000}, "missing"),
        ({"llama.embedding_length": 128}, "asks for|says"),
        ({"llama.context_length": "long"}, "not int"),
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
        ({"tokenizer.ggml.model": "t5"}, "t5"),
        ({"tokenizer.ggml.eos_token_id": 5000}, "5000"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token types"),
        ({"tokenizer.ggml.merges": ["nopair"]}, "pair"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "cannot be built"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_refused_by_name(extra: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = make_tiny_gguf(tmp_path / "odd.gguf", extra=extra)
    with pytest.raises(ModelError, match=said) as caught:
        checkpoints.load(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "model config" in str(caught.value)
