"""What comes out does not depend on how many chips there are, nor along which axes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.compilation import counting_compiles
from engine.errors import ConfigError
from kernels.paged_attention import available_backends
from tests.sharding.meshes import DRAWN, GREEDY, ONE_DEVICE, checkpoint, engine, prompts, tokens

BACKENDS = available_backends()
MESHES = [
    (1, 1, 1, 2, 1),
    (1, 1, 1, 4, 1),
    (1, 1, 1, 8, 1),
    (2, 1, 1, 1, 1),
    (4, 1, 1, 2, 1),
    (1, 2, 1, 1, 1),
    (2, 2, 1, 2, 1),
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
EXPERTS = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


@functools.cache
def on_one_device(backend: str, model: str, **options: Any) -> tuple[Any, Any]:
    single = engine(ONE_DEVICE, json.loads(model), attention_backend=backend, linear_backend=backend, **options)
    return tokens(single, GREEDY), tokens(single, DRAWN)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", MESHES)
def test_tokens_are_those_of_one_device(dims, backend):
    split = engine(dims, attention_backend=backend, linear_backend=backend)
    model = json.dumps({"tie_word_embeddings": False})
    assert (tokens(split, GREEDY), tokens(split, DRAWN)) == on_one_device(backend, model)
    mesh = "".join(
        f" {name}={size}" for name, size in zip(("dp", "fsdp", "ep", "tp", "sp"), dims, strict=True) if size > 1
    )
    assert f", {np.prod(dims)} devices:{mesh}, " in split.stats().device


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(1, 1, 1, 2, 1), (1, 1, 1, 5, 1), (1, 2, 1, 4, 1), (1, 1, 1, -1, 1)])
def test_what_does_not_divide_is_filled_up(dims, backend):
    split = engine(dims, UNEVEN, attention_backend=backend, linear_backend=backend)
    assert (tokens(split, GREEDY), tokens(split, DRAWN)) == on_one_device(backend, json.dumps(UNEVEN))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(1, 1, 2, 1, 1), (1, 1, 4, 2, 1), (2, 1, 2, 2, 1), (1, 1, 1, -1, 1)])
def test_experts_are_split(dims, backend):
    split = engine(dims, EXPERTS, attention_backend=backend, linear_backend=backend)
    assert (tokens(split, GREEDY), tokens(split, DRAWN)) == on_one_device(backend, json.dumps(EXPERTS))


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="ep is 3, and the model has 4 experts a layer"):
        engine((1, 1, 3, 1, 1), EXPERTS)
    with pytest.raises(ConfigError, match="fsdp is 2, and the weights of experts"):
        engine((1, 2, 1, 1, 1), EXPERTS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("formats", [("int8", "int8"), ("int4", "float32")])
def test_quantised_weights_are_cut_between_groups(formats, backend):
    """Two heads of 64 and two groups of 64 inner units: each chip has whole groups, so the same numbers."""
    model = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "intermediate_size": 128}
    options = {"weight_dtype": formats[0], "kv_dtype": formats[1]}
    split = engine((2, 2, 1, 2, 1), model, attention_backend=backend, linear_backend=backend, **options)
    assert tokens(split, GREEDY) == on_one_device(backend, json.dumps(model), **options)[0]


def test_log_probabilities_penalties_and_masks_are_those_of_one_device():
    sampling = GREEDY.replace(
        logprobs=3, prompt_logprobs=2, presence_penalty=0.7, bad_words=("the",), logit_bias={9: 2.0}
    )
    single, split = engine(ONE_DEVICE), engine((2, 1, 1, 3, 1))
    for ours, theirs in zip(
        split.generate(prompts(), sampling), single.generate(prompts(), sampling), strict=True
    ):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        pairs = [*zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True)]
        pairs += zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True)
        for mine, other in pairs:
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in other.top]


def test_weights_and_pages_are_split_and_counted_by_chip():
    single, split = (engine(dims, kv_cache_bytes=1 << 18) for dims in (ONE_DEVICE, (1, 2, 1, 2, 1)))
    whole, part = single._runner._model.num_bytes, split._runner._model.num_bytes
    assert whole / 4 < part < whole / 3.5  # norms are on every chip
    assert split._runner._layout.num_kv_heads == 1  # of two
    pages = split._runner._kv_pages.keys
    assert len({shard.device for shard in pages.addressable_shards}) == 4
    # The budget is a chip's, which has half of each page and a replica of its own.
    assert split._runner.num_pages == 2 * single._runner.num_pages
    assert split.num_pages == 2 * split._runner.num_pages
    for array in jax.tree.leaves(split._runner._model):
        assert len({shard.device for shard in array.addressable_shards}) == 4


def test_weights_in_memory_are_split_like_those_of_a_checkpoint():
    from engine import checkpoints
    from engine.config import EngineConfig
    from engine.engine import Engine
    from tests.sharding.meshes import OPTIONS

    source = checkpoint(tie_word_embeddings=False)
    config = EngineConfig(sharding_axis_dims=(1, 1, 1, 2, 1), **OPTIONS)
    loaded = checkpoints.load(source)
    assert loaded.stored is None
    kept = Engine(loaded, config)
    assert tokens(kept, GREEDY) == tokens(engine((1, 1, 1, 2, 1)), GREEDY)
    taken = Engine(loaded, config, takes_weights=True)
    assert tokens(taken, GREEDY) == tokens(kept, GREEDY)
    assert loaded.model.embed.get_value().is_deleted()


def test_bfloat16_runs_and_is_near():
    sampling = GREEDY.replace(logprobs=0, max_tokens=4)
    single, split = (engine(dims, dtype="bfloat16") for dims in (ONE_DEVICE, (1, 2, 1, 4, 1)))
    for ours, theirs in zip(split.generate(prompts(), sampling), single.generate(prompts(), sampling), strict=True):
        near, exact = ours.outputs[0].cumulative_logprob, theirs.outputs[0].cumulative_logprob
        assert near == pytest.approx(exact, rel=0.1)


def test_nothing_is_traced_after_the_start():
    split = engine((2, 1, 1, 4, 1))
    with counting_compiles() as count:
        tokens(split, DRAWN.replace(presence_penalty=0.5, bad_words=("the",), logit_bias={7: 1.0}), seed=3)
    assert count.num_requests == 0


def test_nan_in_pages_nobody_holds_changes_nothing():
    wanted = tokens(engine((2, 1, 1, 2, 1)), DRAWN)
    poisoned = engine((2, 1, 1, 2, 1))
    runner = poisoned._runner
    sharding = runner._kv_pages.keys.sharding
    runner._kv_pages = jax.tree.map(
        lambda x: jax.device_put(jnp.full(x.shape, jnp.nan, x.dtype), sharding), runner._kv_pages
    )
    assert tokens(poisoned, DRAWN) == wanted


def test_tokens_do_not_depend_on_company_or_order():
    """On a mesh as on one device: the sums over chips have one order."""
    split = engine((2, 1, 1, 4, 1))
    together = tokens(split, GREEDY.replace(n=1))
    alone = [split.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts()]
    assert [[token_ids] for token_ids in alone] == together


def test_prefixes_stay_where_they_are_known():
    split = engine((2, 1, 1, 1, 1))
    stem = list(range(4, 4 + 96))
    split.generate([[*stem, 200]], GREEDY)
    (output,) = split.generate([[*stem, 201]], GREEDY)
    assert output.num_cached_tokens == 96


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((1, 1, 1, 16, 1), "needs 16 devices, and JAX has 8"),
        ((3, 1, 1, -1, 1), "8 devices are not a multiple of 3"),
        ((1, 1, 2, 1, 1), "ep is 2, and the model has 0 experts"),
        ((1, 1, 1, 1, 2), "sp is 2"),
    ],
)
def test_meshes_that_cannot_be_are_refused(dims, message):
    with pytest.raises(ConfigError, match=message):
        engine(dims)




