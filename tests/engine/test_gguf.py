"""GGUF: every quantisation, llama.cpp's row order, and the same model as in a folder."""

from __future__ import annotations

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
from hypothesis import given
from hypothesis import strategies as st

from engine import checkpoints
from engine.checkpoints import gguf_model
from engine.checkpoints.gguf_file import SUPPORTED_TYPES, read_gguf_header
from engine.checkpoints.gguf_model import GgufWeights, gguf_config, half_split_rows
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
    mlp: Any = loaded.model.layers[0].mlp
    assert mlp.down.weight.dtype == jnp.bfloat16
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
