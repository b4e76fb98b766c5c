"""What comes out does not depend on how many chips there are, nor along which axes."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import checkpoints
from engine.compilation import counting_compiles
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.mesh import AXES
from kernels.paged_attention import available_backends
from tests.sharding.meshes import (
    DRAWN,
    GREEDY,
    ONE_DEVICE,
    OPTIONS,
    UNTIED,
    checkpoint,
    engine,
    new_engine,
    prompts,
    tokens,
)

BACKENDS = available_backends()
BEST = BACKENDS[-1]  # the native one, where there is one: it compiles in a third of the time
MIXED = (2, 2, 1, 2, 1)
MESHES = [
    (1, 1, 1, 2, 1),
    (1, 1, 1, 4, 1),
    (1, 1, 1, 8, 1),
    (2, 1, 1, 1, 1),
    pytest.param((4, 1, 1, 2, 1), marks=pytest.mark.slow),
    pytest.param((1, 2, 1, 1, 1), marks=pytest.mark.slow),
    MIXED,
]
# Heads, inner units and a vocabulary that most numbers of chips do not divide, biases, tied embeddings.
UNEVEN = {
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 100,
    "attention_bias": True,
    "mlp_bias": True,
}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **UNTIED}


@functools.cache
def on_one_device(backend: str, model: str, **options: Any) -> tuple[Any, Any]:
    single = engine(ONE_DEVICE, json.loads(model), **_by(backend), **options)
    return tokens(single, GREEDY), tokens(single, DRAWN)


def _by(backend: str) -> dict[str, str]:
    return {"attention_backend": backend, "linear_backend": backend}


def check(dims: tuple[int, ...], model: dict[str, Any], backend: str = BEST, **options: Any) -> None:
    split = engine(dims, model, **_by(backend), **options)
    wanted = on_one_device(backend, json.dumps(model), **options)
    assert (tokens(split, GREEDY), tokens(split, DRAWN)) == wanted
    sizes = "".join(f" {name}={size}" for name, size in zip(AXES, dims, strict=True) if size > 1)
    if -1 not in dims:
        assert f", {np.prod(dims)} devices:{sizes}, " in split.stats().device


@pytest.mark.parametrize("dims", MESHES)
def test_tokens_are_those_of_one_device(dims):
    check(dims, UNTIED)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "dims",
    [
        (1, 1, 1, 2, 1),
        (1, 1, 1, -1, 1),
        pytest.param((1, 1, 1, 5, 1), marks=SLOW),
        pytest.param((1, 2, 1, 4, 1), marks=SLOW),
    ],
)
def test_what_does_not_divide_is_filled_up(dims):
    check(dims, UNEVEN)


@pytest.mark.parametrize("dims", [(1, 1, 4, 2, 1), (1, 2, 2, 2, 1)])
def test_experts_are_split(dims):
    check(dims, EXPERTS)


@pytest.mark.parametrize("model", [UNEVEN, pytest.param(EXPERTS, marks=SLOW)])
def test_other_kernels_are_split_alike(model):
    """XLA's code, where the native one is best."""
    check(MIXED if model is UNEVEN else (1, 2, 2, 2, 1), model, "xla")


@pytest.mark.parametrize("backend", [BEST, *(pytest.param(x, marks=SLOW) for x in BACKENDS[:-1])])
@pytest.mark.parametrize("formats", [("int8", "int8"), ("int4", "float32")])
def test_quantised_weights_are_cut_between_groups(formats, backend):
    """Two heads of 64 and two groups of 64 inner units: each chip has whole groups, so the same numbers."""
    model = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "intermediate_size": 128}
    check(MIXED, model, backend, weight_dtype=formats[0], kv_dtype=formats[1])


def test_log_probabilities_penalties_and_masks_are_those_of_one_device():
    sampling = GREEDY.replace(
        logprobs=3, prompt_logprobs=2, presence_penalty=0.7, bad_words=("the",), logit_bias={9: 2.0}
    )
    # Three chips: the rows of logits do not divide.
    ours, theirs = (engine(dims).generate(prompts(), sampling) for dims in ((2, 1, 1, 3, 1), ONE_DEVICE))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.outputs[0].token_ids == other.outputs[0].token_ids
        parts = [(each.outputs[0].logprobs, each.prompt_logprobs) for each in (mine, other)]
        entries: list[Any] = [[*(drawn or ()), *(known or ())[1:]] for drawn, known in parts]
        for near, exact in zip(*entries, strict=True):
            assert near.logprob == pytest.approx(exact.logprob, abs=1e-4)
            assert [token for token, _ in near.top] == [token for token, _ in exact.top]


def test_weights_and_pages_are_split_and_counted_by_chip():
    single, split = (new_engine(dims, kv_cache_bytes=1 << 18) for dims in (ONE_DEVICE, (1, 2, 1, 2, 1)))
    whole, part = single._runner._model.num_bytes, split._runner._model.num_bytes
    assert whole / 4 < part < whole / 3.5  # norms are on every chip
    assert split._runner._layout.num_kv_heads == 1  # of two
    # The budget is a chip's, which has half of each page and a replica of its own.
    assert split._runner.num_pages == 2 * single._runner.num_pages
    assert split.num_pages == 2 * split._runner.num_pages
    for array in jax.tree.leaves((split._runner._model, split._runner._kv_pages)):
        assert len({shard.device for shard in array.addressable_shards}) == 4


def test_weights_in_memory_are_split_like_those_of_a_checkpoint():
    dims = (1, 1, 1, 2, 1)
    config = EngineConfig(sharding_axis_dims=dims, **OPTIONS)
    loaded = checkpoints.load(checkpoint(**UNTIED))
    assert loaded.stored is None
    wanted = tokens(engine(dims), GREEDY)
    assert tokens(Engine(loaded, config), GREEDY) == wanted
    assert tokens(Engine(loaded, config, takes_weights=True), GREEDY) == wanted
    assert loaded.model.embed.get_value().is_deleted()


def test_bfloat16_runs_and_is_near():
    sampling = GREEDY.replace(logprobs=0, max_tokens=4)
    single, split = (engine(dims, dtype="bfloat16") for dims in (ONE_DEVICE, (1, 2, 1, 4, 1)))
    pairs = zip(split.generate(prompts(), sampling), single.generate(prompts(), sampling), strict=True)
    for mine, other in pairs:
        near, exact = mine.outputs[0].cumulative_logprob, other.outputs[0].cumulative_logprob
        assert near == pytest.approx(exact, rel=0.1)


def test_nothing_is_traced_after_the_start():
    split = engine(MIXED)
    with counting_compiles() as count:
        tokens(split, DRAWN.replace(presence_penalty=0.5, bad_words=("the",), logit_bias={7: 1.0}), seed=3)
    assert count.num_requests == 0


def test_nan_in_pages_nobody_holds_changes_nothing():
    poisoned = new_engine(MIXED)
    runner = poisoned._runner
    runner._kv_pages = jax.tree.map(
        lambda x: jax.device_put(jnp.full(x.shape, jnp.nan, x.dtype), x.sharding), runner._kv_pages
    )
    assert tokens(poisoned, DRAWN) == tokens(engine(MIXED), DRAWN)


def test_a_row_has_the_same_bits_in_any_company():
    """On a mesh of CPU devices as on one: what the chips make is added in one order."""
    split = engine((2, 1, 1, 4, 1))
    sampling = GREEDY.replace(logprobs=0)
    together = split.generate(prompts(), sampling)
    for prompt, output in zip(prompts(), together, strict=True):
        (alone,) = split.generate([prompt], sampling)
        assert alone.outputs[0].logprobs == output.outputs[0].logprobs


def test_a_prompt_goes_to_the_replica_that_knows_its_beginning():
    split = engine((2, 1, 1, 1, 1))
    stem = list(range(4, 4 + 96))
    for last in range(200, 206):
        (output,) = split.generate([[*stem, last]], GREEDY)
    assert output.num_cached_tokens == 96
    assert split.stats().running == 0


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((1, 1, 1, 16, 1), "needs 16 devices, and there are 8"),
        ((3, 1, 1, -1, 1), "8 devices are not a multiple of 3"),
        ((1, 1, 2, 1, 1), "ep is 2, and the model has 0 experts"),
        ((1, 1, 1, 1, 2), "sp is 2"),
    ],
)
def test_meshes_that_cannot_be_are_refused(dims, message):
    with pytest.raises(ConfigError, match=message):
        new_engine(dims)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="ep is 3, and the model has 4 experts a layer"):
        new_engine((1, 1, 3, 1, 1), EXPERTS)
