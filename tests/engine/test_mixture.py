"""Mixtures of experts: what they compute, and that only what was chosen matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from engine import checkpoints
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ModelError
from engine.models.dense import dense_forward
from engine.models.mixture import Mixture
from engine.sampling_params import SamplingParams
from kernels.linear import available_backends
from tests.tiny_model import make_tiny_checkpoint

CONFIG = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.LoadedModel:
    return checkpoints.load(make_tiny_checkpoint(tmp_path_factory.mktemp("experts") / "model", **CONFIG))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_it_is_the_weighted_sum_of_the_chosen_experts(loaded: checkpoints.LoadedModel):
    """Token by token in float64, as the papers write it."""
    mlp = loaded.model.layers[0].mlp
    assert isinstance(mlp, Mixture)
    norm = loaded.model.layers[0].mlp_norm
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    found = np.asarray(mlp(jnp.asarray(x), norm))
    for token, row in enumerate(x.astype(np.float64)):
        h = row / np.sqrt((row * row).mean() + 1e-5) * np.asarray(norm.weight.get_value(), np.float64)
        logits = np.asarray(mlp.router.weight.get_value(), np.float64) @ h
        chosen = np.argsort(-logits)[:2]
        shares = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        made = np.zeros(64)
        for share, index in zip(shares, chosen, strict=True):
            expert = mlp.experts[int(index)]
            gate, up = np.split(np.asarray(expert.gate_up.weight.get_value(), np.float64) @ h, 2)
            made += share * (np.asarray(expert.down.weight.get_value(), np.float64) @ (silu(gate) * up))
        np.testing.assert_allclose(found[token], row + made, atol=1e-4)


def make_engine(loaded: checkpoints.LoadedModel, backend: str, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 96,
        "min_token_pad": 32,
        "max_model_len": 128,
        "page_size": 16,
        "kv_cache_bytes": 1 << 20,
    }
    return Engine(loaded, EngineConfig(linear_backend=backend, **(defaults | options)))


PROMPTS = [np.random.default_rng(seed).integers(4, 250, 5 + 17 * seed).tolist() for seed in range(6)]


@pytest.mark.parametrize("backend", available_backends())
def test_a_step_computes_what_the_plain_model_does(loaded: checkpoints.LoadedModel, backend: str):
    """In chunks and in company; more tokens choose an expert than a tile has rows."""
    engine = make_engine(loaded, backend)
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, sampling), strict=True):
        completion = output.outputs[0]
        ids = np.zeros(128, np.int32)
        known = prompt + list(completion.token_ids)
        ids[: len(known)] = known
        logits = np.asarray(dense_forward(loaded.model, ids[None]))[0].astype(np.float64)
        assert completion.logprobs is not None
        for place, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            row = logits[len(prompt) - 1 + place]
            assert token == row.argmax()
            shifted = row - row.max()
            assert entry.logprob == pytest.approx(shifted[token] - np.log(np.exp(shifted).sum()), abs=1e-4)


@pytest.mark.parametrize("backend", available_backends())
def test_tokens_have_the_same_bits_in_any_company(loaded: checkpoints.LoadedModel, backend: str):
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    engine = make_engine(loaded, backend, enable_prefix_caching=False)
    together = engine.generate(PROMPTS, sampling)
    for prompt, output in zip(PROMPTS, together, strict=True):
        (alone,) = engine.generate([prompt], sampling)
        assert alone.outputs[0].logprobs == output.outputs[0].logprobs


def test_what_is_no_mixture_is_refused(tmp_path: Path):
    folder = Path(make_tiny_checkpoint(tmp_path / "model", **CONFIG))
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"num_experts_per_tok": 5}, "4 experts, 5 a token"),
        ({"num_local_experts": 0}, "0 experts, 2 a token"),
        ({"sliding_window": 4096}, "sliding_window is set"),
        ({"num_local_experts": 5}, "experts.4.w1.weight is missing|gate.weight is"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=message):
            checkpoints.load(str(folder))
