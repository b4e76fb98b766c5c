"""The parts of a model are the model: every weight is on the chips that need it, and counted once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.models.config import ModelConfig
from engine.models.tensor_split import TensorSplit


def config(kv_heads: int, ratio: int, inner: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        d_model=8,
        num_layers=1,
        num_heads=kv_heads * ratio,
        num_kv_heads=kv_heads,
        head_dim=4,
        intermediate_size=inner,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=64,
    )


SPLITS = st.builds(
    TensorSplit,
    st.builds(config, st.integers(1, 9), st.integers(1, 9), st.integers(1, 300), st.integers(1, 90)),
    st.integers(1, 17),
    st.sampled_from(["float32", "int8"]),
)


@given(SPLITS)
def test_every_query_head_is_on_one_chip_beside_its_kv_head(split: TensorSplit):
    seen = []
    ratio = split.config.num_heads // split.config.num_kv_heads
    for chip in range(split.num_chips):
        kv_heads, query_heads = split.kv_heads(chip), split.query_heads(chip)
        assert len(kv_heads) == split.local_config.num_kv_heads
        assert len(query_heads) == split.local_config.num_heads
        for place, head in enumerate(query_heads):
            kv_head = kv_heads[place // split.query_heads_each]
            assert head == -1 or kv_head == head // ratio
        seen += [head for head in query_heads if head >= 0]
    assert sorted(seen) == list(range(split.config.num_heads))


@given(SPLITS)
def test_inner_units_and_tokens_are_on_one_chip_each(split: TensorSplit):
    for path, size in ((("embed",), split.config.vocab_size), (("layers", 0, "mlp", "down", "weight"), None)):
        size = size or split.config.intermediate_size
        cuts = [cut.indices for chip in range(split.num_chips) if (cut := split.cut(path, chip))]
        assert len(cuts) == split.num_chips
        assert len({len(indices) for indices in cuts}) == 1
        indices = np.concatenate(cuts)
        assert indices[indices >= 0].tolist() == list(range(size))
    if split.weight_format == "int8":
        assert split.inner_each % 64 == 0


@given(SPLITS, st.integers(0, 2**32 - 1))
def test_what_the_chips_compute_adds_up(split: TensorSplit, seed: int):
    """A gate, an up and a down, and a bias: the sum over the chips is the product of the whole."""
    pick = np.random.default_rng(seed)
    inner, dim = split.config.intermediate_size, split.config.d_model
    gate_up, down = pick.standard_normal((2 * inner, dim)), pick.standard_normal((dim, inner))
    bias, x = pick.standard_normal(dim), pick.standard_normal(dim)

    def mlp(gate_up: np.ndarray, down: np.ndarray, bias: np.ndarray) -> np.ndarray:
        gate, up = np.split(gate_up @ x, 2)
        return down @ (np.tanh(gate) * up) + bias

    def part(name: str, array: np.ndarray, chip: int, kind: str = "weight") -> np.ndarray:
        cut = split.cut(("layers", 0, "mlp", name, kind), chip)
        return array if cut is None else cut.of(array)

    total = sum(
        mlp(part("gate_up", gate_up, chip), part("down", down, chip), part("down", bias, chip, "bias"))
        for chip in range(split.num_chips)
    )
    np.testing.assert_allclose(total, mlp(gate_up, down, bias), atol=1e-9)


@pytest.mark.parametrize(
    ("kv_heads", "ratio", "num_chips", "kv_each", "heads_each"),
    [(8, 4, 8, 1, 4), (8, 8, 4, 2, 16), (2, 4, 8, 1, 1), (3, 3, 2, 2, 6), (3, 3, 8, 1, 2), (1, 8, 4, 1, 2)],
)
def test_heads_of_a_chip(kv_heads, ratio, num_chips, kv_each, heads_each):
    local = TensorSplit(config(kv_heads, ratio, 64, 64), num_chips, "float32").local_config
    assert (local.num_kv_heads, local.num_heads) == (kv_each, heads_each)
