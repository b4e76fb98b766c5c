"""GGUF: every quantisation, llama.cpp's row order, and files that lie or end early."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import checkpoints
from engine.checkpoints import gguf_model
from engine.checkpoints.gguf_file import SUPPORTED_TYPES, read_gguf_header
from engine.checkpoints.gguf_model import GgufWeights, gguf_config, half_split_rows
from engine.errors import ModelError
from engine.models import dense_forward
from engine.models.llama import WeightPart
from tests.engine.gguf_maker import (
    interleave,
    make_tiny_gguf,
    model_metadata,
    tokenizer_metadata,
    write_gguf,
)
from tests.parity.cases import tiny_token_ids
from tests.tiny_model import make_tiny_checkpoint, tiny_config


def weights_of(loaded: checkpoints.LoadedModel) -> dict[Any, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(loaded.model))}


# The same model in both formats.


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24, "attention_bias": True},
        {"mlp_bias": True},
    ],
    ids=["default", "one_kv_head_untied", "wide_heads_biased", "mlp_bias"],
)
def test_a_gguf_holds_the_model_of_the_folder(tmp_path: Path, overrides: dict[str, Any]) -> None:
    """Bit for bit: names, shapes, fused rows and the order of rotated rows."""
    folder = checkpoints.load(make_tiny_checkpoint(tmp_path / "hf", **overrides))
    file = checkpoints.load(str(make_tiny_gguf(tmp_path / "tiny.gguf", **overrides)))
    assert file.config.num_kv_heads == folder.config.num_kv_heads
    assert file.config.attention_bias == folder.config.attention_bias
    expected = weights_of(folder)
    found = weights_of(file)
    assert found.keys() == expected.keys()
    for path, values in found.items():
        np.testing.assert_array_equal(values, expected[path], err_msg=str(path))
    chat = [{"role": "user", "content": "The answer, in 12 words?"}]
    assert checkpoints.render_chat(file.tokenizer, chat) == checkpoints.render_chat(folder.tokenizer, chat)
    assert file.config.eos_token_ids == (2,)


@given(heads=st.integers(1, 8), half=st.integers(1, 16))
def test_the_row_order_undoes_the_converters(heads: int, half: int) -> None:
    rows = np.arange(heads * 2 * half)
    restored = np.empty_like(rows)
    restored[half_split_rows(rows.size, heads)] = interleave(rows, heads)
    np.testing.assert_array_equal(restored, rows)


def test_rope_factors_are_those_of_llama3_scaling(tmp_path: Path) -> None:
    """llama.cpp's converter stores llama3 scaling as a tensor of divisors; the result is the config's."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = checkpoints.load(make_tiny_checkpoint(tmp_path / "hf", rope_scaling=scaling))
    plain = 10000.0 ** -(np.arange(8) / 8)
    wavelength = 2 * np.pi / plain
    smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
    factors = np.where(
        wavelength < 32 / 4.0, 1.0, np.where(wavelength > 32 / 1.0, 8.0, 1 / ((1 - smooth) / 8.0 + smooth))
    ).astype(np.float32)
    config = tiny_config(298)
    base = read_gguf_header(make_tiny_gguf(tmp_path / "base.gguf"))
    tensors = {
        name: (
            np.fromfile(base.path, np.float32, tensor.num_bytes // 4, offset=tensor.offset).reshape(
                tensor.shape
            ),
            Kind.F32,
        )
        for name, tensor in base.tensors.items()
    }
    tensors["rope_freqs.weight"] = (factors, Kind.F32)
    path = write_gguf(tmp_path / "llama3.gguf", model_metadata(config) | tokenizer_metadata(), tensors)
    loaded = checkpoints.load(str(path))
    ids = tiny_token_ids()
    np.testing.assert_allclose(
        np.asarray(dense_forward(loaded.model, ids)), np.asarray(dense_forward(folder.model, ids)), atol=1e-4
    )


def test_linear_rope_scaling_is_read(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = gguf_config(read_gguf_header(make_tiny_gguf(tmp_path / "a.gguf", extra=extra)))
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 4.0)
    old = gguf_config(
        read_gguf_header(make_tiny_gguf(tmp_path / "b.gguf", extra={"llama.rope.scale_linear": 2.0}))
    )
    assert old.rope_scaling is not None
    assert old.rope_scaling.factor == 2.0


# Every quantisation. The decoders below follow ggml's format one value at a time, on their own.


def half(data: bytes) -> float:
    return float(np.frombuffer(data, np.float16)[0])


def decode_q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * q for q in np.frombuffer(block[2:], np.int8).tolist()]


def decode_q4_0(block: bytes) -> list[float]:
    d, qs = half(block[:2]), block[2:]
    return [d * ((q & 15) - 8) for q in qs] + [d * ((q >> 4) - 8) for q in qs]


def decode_q4_1(block: bytes) -> list[float]:
    d, m, qs = half(block[:2]), half(block[2:4]), block[4:]
    return [d * (q & 15) + m for q in qs] + [d * (q >> 4) + m for q in qs]


def k_scale_min(scales: bytes, index: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of sub-block `index`, packed in 12 bytes (get_scale_min_k4)."""
    if index < 4:
        return scales[index] & 63, scales[index + 4] & 63
    scale = (scales[index + 4] & 15) | (scales[index - 4] >> 6) << 4
    return scale, (scales[index + 4] >> 4) | (scales[index] >> 6) << 4


def decode_q4_k(block: bytes) -> list[float]:
    d, dmin, scales, qs = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    values = []
    for sub in range(8):
        scale, minimum = k_scale_min(scales, sub)
        for i in range(32):
            byte = qs[sub // 2 * 32 + i]
            values.append(d * scale * (byte >> 4 if sub % 2 else byte & 15) - dmin * minimum)
    return values


def decode_q5_k(block: bytes) -> list[float]:
    d, dmin, scales, qh, qs = half(block[:2]), half(block[2:4]), block[4:16], block[16:48], block[48:]
    values = []
    for sub in range(8):
        scale, minimum = k_scale_min(scales, sub)
        for i in range(32):
            byte = qs[sub // 2 * 32 + i]
            q = (byte >> 4 if sub % 2 else byte & 15) + (16 if qh[i] >> sub & 1 else 0)
            values.append(d * scale * q - dmin * minimum)
    return values


def decode_q6_k(block: bytes) -> list[float]:
    ql, qh, scales, d = (
        block[:128],
        block[128:192],
        np.frombuffer(block[192:208], np.int8).tolist(),
        half(block[208:]),
    )
    values = [0.0] * 256
    for part in range(2):
        for i in range(32):
            low, high, bits = ql[64 * part + i], ql[64 * part + 32 + i], qh[32 * part + i]
            quads = (low & 15, high & 15, low >> 4, high >> 4)
            for j, quad in enumerate(quads):
                q = (quad | (bits >> 2 * j & 3) << 4) - 32
                values[128 * part + 32 * j + i] = d * scales[8 * part + 2 * j + i // 16] * q
    return values


DECODERS: dict[Kind, tuple[int, int, Callable[[bytes], list[float]]]] = {
    Kind.Q8_0: (32, 34, decode_q8_0),
    Kind.Q4_0: (32, 18, decode_q4_0),
    Kind.Q4_1: (32, 20, decode_q4_1),
    Kind.Q4_K: (256, 144, decode_q4_k),
    Kind.Q5_K: (256, 176, decode_q5_k),
    Kind.Q6_K: (256, 210, decode_q6_k),
}
HALF_FIELDS = {
    Kind.Q8_0: (0,),
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}


def random_blocks(kind: Kind, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random quantised bytes u8[rows, blocks * block_bytes] with finite scales."""
    rng = np.random.default_rng(seed)
    block_bytes = DECODERS[kind][1]
    raw = rng.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    for at in HALF_FIELDS[kind]:
        scales = rng.normal(0, 0.02, (rows, blocks)).astype(np.float16)
        raw[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def read_one(path: Path, data: np.ndarray, kind: Kind, heads: int | None = None) -> np.ndarray:
    """Store one tensor as a layer's q projection and read it back through our reader."""
    file = read_gguf_header(
        write_gguf(path, {"general.architecture": "llama"}, {"blk.0.attn_q.weight": (data, kind)})
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = file.tensors["blk.0.attn_q.weight"].shape
    target = np.full(shape, np.nan, np.float32)
    GgufWeights(file).read_into(WeightPart(name, shape, rotary_heads=heads), target)
    return target


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_quantised_blocks_decode_as_the_format_says(kind: Kind, tmp_path: Path) -> None:
    block_len, block_bytes, decode = DECODERS[kind]
    raw = random_blocks(kind, rows=6, blocks=2)
    expected = [
        [
            value
            for at in range(0, len(row), block_bytes)
            for value in decode(row[at : at + block_bytes].tobytes())
        ]
        for row in raw
    ]
    found = read_one(tmp_path / "one.gguf", raw, kind)
    assert found.shape == (6, 2 * block_len)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Kind.F32, 0.0),
        (Kind.F16, 2e-3),
        (Kind.BF16, 1e-2),
        (Kind.Q8_0, 0.02),
        (Kind.Q4_0, 0.3),
        (Kind.Q4_1, 0.2),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else "",
)
def test_quantised_values_come_back_within_a_step(kind: Kind, error: float, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(0, 1, (8, 64)).astype(np.float32)
    found = read_one(tmp_path / "one.gguf", quantize(values, kind), kind)
    np.testing.assert_allclose(found, values, rtol=0, atol=error)
    assert (np.abs(found - values).max() == 0) == (kind is Kind.F32)


def test_every_supported_type_is_tested() -> None:
    assert set(SUPPORTED_TYPES) == {Kind.F32, Kind.F16, Kind.BF16, *DECODERS}


@pytest.mark.parametrize("heads", [None, 4])
def test_reading_in_slices_changes_nothing(
    heads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = random_blocks(Kind.Q4_1, rows=24, blocks=3)
    whole = read_one(tmp_path / "a.gguf", raw, Kind.Q4_1, heads)
    monkeypatch.setattr(gguf_model, "SLICE_VALUES", 96 * 5)
    np.testing.assert_array_equal(read_one(tmp_path / "b.gguf", raw, Kind.Q4_1, heads), whole)
    assert np.isfinite(whole).all()


def test_a_whole_model_of_mixed_quantisations_runs(tmp_path: Path) -> None:
    """As llama.cpp's mixes are: another type for each tensor, float32 norms."""
    config: dict[str, Any] = tiny_config(298) | {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 512,
    }
    base = read_gguf_header(make_tiny_gguf(tmp_path / "base.gguf", **config))
    kinds = list(DECODERS)
    tensors: dict[str, tuple[np.ndarray, Kind]] = {}
    for index, (name, tensor) in enumerate(base.tensors.items()):
        kind = kinds[index % len(kinds)] if len(tensor.shape) == 2 else Kind.F32
        if kind is Kind.F32:
            data = np.fromfile(base.path, np.float32, tensor.num_bytes // 4, offset=tensor.offset)
        else:
            data = random_blocks(kind, tensor.shape[0], tensor.shape[1] // DECODERS[kind][0], seed=index)
        tensors[name] = (data, kind)
    path = write_gguf(tmp_path / "mixed.gguf", model_metadata(config) | tokenizer_metadata(), tensors)
    loaded = checkpoints.load(str(path), dtype="bfloat16")
    assert loaded.model.layers[0].mlp.down.weight.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(dense_forward(loaded.model, tiny_token_ids()))).all()


def test_loading_holds_a_few_tensors_at_a_time_and_never_a_second_model(tmp_path: Path) -> None:
    """Host memory beyond the model: the tensor being read and its slices."""
    overrides: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "intermediate_size": 1024,
        "tie_word_embeddings": False,
    }
    path = make_tiny_gguf(tmp_path / "big.gguf", **overrides)
    file = read_gguf_header(path)
    model_bytes = sum(tensor.num_bytes for tensor in file.tensors.values())
    largest = 2 * 1024 * 256 * 4
    checkpoints.load(str(path))  # Imports and caches are not the model.
    tracemalloc.start()
    loaded = checkpoints.load(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = sum(leaf.nbytes for leaf in weights_of(loaded).values())
    assert kept == model_bytes
    # JAX may keep the host buffer itself as the array, so up to one model is traced, and never a second.
    assert peak < model_bytes + 3 * largest + 4_000_000


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
