"""The model: parity with transformers, and what a token's result may depend on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import checkpoints
from engine.checkpoints import LoadedModel
from engine.errors import ModelError
from engine.models import ModelConfig, RopeScaling, abstract_llama, attention_scale, dense_forward
from engine.models.llama import weight_plan
from engine.models.rope import apply_rope, inverse_frequencies, rope_tables
from tests.parity import cases
from tests.parity.compare import Reference, compare, load_references

SMALL = ModelConfig(
    vocab_size=40,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=64,
)


def filled(config: ModelConfig, seed: int = 0) -> Any:
    """A model of `config` with random weights."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(abstract_llama(config))
    leaves = {
        path: leaf.replace(
            jnp.asarray(
                rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32) + (len(leaf.shape) == 1)
            )
        )
        for path, leaf in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(leaves))


# Parity with transformers, from stored values.


@pytest.mark.parametrize("case", cases.TINY_CASES)
def test_every_config_switch_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    with np.load(cases.TINY_FILE) as stored:
        expected = stored[case]
    model = checkpoints.load(cases.make_case(case, tmp_path)).model
    found = np.asarray(dense_forward(model, cases.tiny_token_ids()))
    assert np.abs(expected).max() > 1, "the case would pass with logits of nothing"
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_the_switches_change_the_result(tmp_path: Path) -> None:
    """Otherwise the cases above would prove nothing: scaling must differ from none, with the same weights."""
    scaling: dict[str, Any] = cases.TINY_CASES["rope_llama3"]
    nothing: dict[str, Any] = scaling | {"rope_scaling": None}
    for name, overrides in (("with", scaling), ("without", nothing)):
        cases.make_tiny_checkpoint(tmp_path / name, **overrides)
    ids = cases.tiny_token_ids()
    scaled, plain = (
        np.asarray(dense_forward(checkpoints.load(str(tmp_path / name)).model, ids))
        for name in ("with", "without")
    )
    assert np.abs(scaled - plain).max() > 0.1


def test_real_model_logits_and_greedy_tokens_equal_transformers(real: LoadedModel) -> None:
    """16 chats: logits within 1e-3 at every prompt position, and all 64 greedy tokens."""
    references = load_references(str(cases.REAL_FILE))
    assert len(references) == len(cases.CHATS) == 16
    near_ties = 0
    for chat, reference in zip(cases.CHATS, references, strict=True):
        assert checkpoints.render_chat(real.tokenizer, chat) == reference.prompt_ids.tolist()
        assert len(reference.output_ids) == cases.NUM_NEW_TOKENS
        difference = compare(real.model, reference)
        assert difference.max_error < cases.MAX_LOGIT_ERROR, chat
        assert difference.wrong_tokens == 0, chat
        near_ties += difference.near_ties
    assert near_ties <= sum(int((r.gaps < cases.NEAR_TIE).sum()) for r in references)


def test_real_model_continues_the_shared_greedy_reference(real: LoadedModel) -> None:
    """Another 16 chats; their smallest gap between the top two is 0.0057, so equality is exact."""
    items = json.loads((cases.DATA / "smollm2_greedy_reference.json").read_text())["items"]
    for item in items:
        prompt, output = item["prompt_token_ids"], item["output_token_ids"]
        reference = Reference(
            np.asarray(prompt),
            np.zeros((len(prompt), 1), int),
            np.zeros((len(prompt), 1)),
            np.asarray(output),
            np.ones(64),
        )
        assert compare(real.model, reference).wrong_tokens == 0, item["question"]


# What a result may depend on.


@pytest.mark.parametrize("wide", [False, True], ids=["tiny", "real_widths"])
def test_a_row_has_the_same_bits_in_any_step(wide: bool) -> None:
    """Embedding, norms, rope, products and the head, at T from 8 to 512: only `attend` sees other rows."""
    config = SMALL
    if wide:
        config = dataclasses.replace(
            SMALL,
            vocab_size=999,
            d_model=576,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            intermediate_size=1536,
        )
    graph, weights = nnx.split(filled(config))
    group = config.num_heads // config.num_kv_heads

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pages: None) -> tuple[jax.Array, None]:
        return q + 0.5 * jnp.repeat(k, group, axis=1) + jnp.repeat(v, group, axis=1), pages

    @jax.jit
    def step(weights: Any, ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, weights)
        hidden, _ = model(ids, positions, (None,) * config.num_layers, attend)
        return hidden, model.logits(hidden)

    rng = np.random.default_rng(3)
    ids = rng.integers(0, config.vocab_size, 512).astype(np.int32)
    positions = rng.integers(0, 8192, 512).astype(np.int32)
    whole = [np.asarray(x) for x in step(weights, ids, positions)]
    for start, stop in ((0, 8), (3, 19), (100, 132), (0, 64), (37, 101), (200, 456)):
        part = step(weights, ids[start:stop], positions[start:stop])
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(
                np.asarray(found), expected[start:stop], err_msg=f"rows {start}:{stop}"
            )


def test_a_position_sees_nothing_after_it(tiny: LoadedModel) -> None:
    ids = cases.tiny_token_ids()
    other = ids.copy()
    other[20:] = other[20:] + 1
    first, second = (np.asarray(dense_forward(tiny.model, x)) for x in (ids, other))
    np.testing.assert_array_equal(first[:20], second[:20])
    assert not np.array_equal(first[20], second[20])


def test_sequences_of_a_batch_are_independent(tiny: LoadedModel) -> None:
    ids = cases.tiny_token_ids().reshape(3, 16)
    batched = np.asarray(dense_forward(tiny.model, ids))
    for row, expected in zip(ids, batched, strict=True):
        np.testing.assert_allclose(np.asarray(dense_forward(tiny.model, row)), expected, atol=1e-4)


def test_attend_is_called_once_a_layer_with_its_own_pages() -> None:
    model = filled(SMALL)
    calls: list[tuple[Any, ...]] = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pages: str) -> tuple[jax.Array, str]:
        calls.append((q.shape, k.shape, v.shape, pages))
        return q, pages.upper()

    hidden, pages = model(jnp.zeros(5, jnp.int32), jnp.arange(5), ("a", "b"), attend)
    assert calls == [((5, 4, 8), (5, 2, 8), (5, 2, 8), page) for page in ("a", "b")]
    assert pages == ("A", "B")
    assert hidden.shape == (5, 32)
    assert model.logits(hidden).shape == (5, 40)
    assert model.logits(hidden).dtype == jnp.float32


def test_attend_gets_queries_unscaled() -> None:
    """The scale belongs to attention: `attention_scale` is 1/sqrt(H)."""
    assert attention_scale(SMALL) == pytest.approx(8**-0.5)
    model = filled(SMALL)
    norms = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pages: None) -> tuple[jax.Array, None]:
        norms.append((q, k))
        return q, pages

    x = jnp.arange(5)
    model(x, jnp.zeros(5, jnp.int32), (None, None), attend)
    normed = model.layers[0].attention_norm(model.embed[...][x])
    expected = normed @ model.layers[0].attention.qkv.weight[...].T
    q, k = norms[0]
    np.testing.assert_allclose(q.reshape(5, -1), expected[:, :32], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(k.reshape(5, -1), expected[:, 32:48], rtol=1e-4, atol=1e-4)


# Construction.


def test_an_abstract_model_holds_no_arrays_and_a_plan_covers_it() -> None:
    huge = dataclasses.replace(SMALL, d_model=1 << 16, vocab_size=1 << 20, attention_bias=True, mlp_bias=True)
    state = dict(nnx.to_flat_state(nnx.state(abstract_llama(huge))))
    assert all(isinstance(leaf.get_raw_value(), jax.ShapeDtypeStruct) for leaf in state.values())
    planned = {target.path: target for target in weight_plan(huge)}
    assert planned.keys() == state.keys()
    for path, target in planned.items():
        rows = sum(part.shape[0] for part in target.parts)
        assert (rows, *target.parts[0].shape[1:]) == state[path].shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(tiny: LoadedModel, dtype: str) -> None:
    half = checkpoints.load(tiny.source, dtype=dtype)
    assert half.model.embed.dtype == jnp.dtype(dtype)
    assert half.model.norm.weight.dtype == jnp.float32
    ids = cases.tiny_token_ids()
    found, expected = (np.asarray(dense_forward(m, ids)) for m in (half.model, tiny.model))
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"d_model": True}, "d_model"),
        ({"num_kv_heads": 3}, "multiple"),
        ({"head_dim": 7}, "even"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"eos_token_ids": (2, 40)}, "40"),
        ({"rope_scaling": RopeScaling(kind="factors", factors=(1.0,))}, "rope factors"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        dataclasses.replace(SMALL, **change)
    assert "\n" not in str(caught.value)


# Rotary embeddings.


def test_linear_scaling_stretches_positions() -> None:
    scaled = dataclasses.replace(SMALL, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    positions = jnp.arange(0, 64, 4)
    for found, expected in zip(
        rope_tables(scaled, positions), rope_tables(SMALL, positions // 4), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@given(
    low=st.floats(0.5, 2), span=st.floats(0.5, 8), factor=st.floats(1, 32), original=st.integers(16, 1 << 17)
)
@settings(max_examples=50, deadline=None)
def test_llama3_scaling_keeps_fast_pairs_and_divides_slow_ones(
    low: float, span: float, factor: float, original: int
) -> None:
    config = dataclasses.replace(SMALL, head_dim=64, rope_theta=5e5)
    scaling = RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=low + span,
        original_max_position_embeddings=original,
    )
    plain = inverse_frequencies(config)
    found = inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    turns = original * plain / (2 * np.pi)
    np.testing.assert_allclose(found[turns > low + span + 0.01], plain[turns > low + span + 0.01], rtol=1e-6)
    np.testing.assert_allclose(found[turns < low - 0.01], plain[turns < low - 0.01] / factor, rtol=1e-6)
    assert np.all(found <= plain * 1.000001)
    assert np.all(found >= plain / factor * 0.999999)
    assert np.all(np.diff(found) < 0)


@given(shift=st.integers(0, 4000), distance=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_rotation_keeps_norms_and_depends_on_distance_alone(shift: int, distance: int) -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, 8)).astype(np.float32) for _ in range(2))

    def at(x: np.ndarray, position: int) -> np.ndarray:
        return np.asarray(apply_rope(jnp.asarray(x), *rope_tables(SMALL, jnp.asarray([position]))))

    assert np.linalg.norm(at(q, shift)) == pytest.approx(np.linalg.norm(q), rel=1e-5)
    near = (at(q, distance) * at(k, 0)).sum()
    assert (at(q, shift + distance) * at(k, shift)).sum() == pytest.approx(near, abs=5e-3)
