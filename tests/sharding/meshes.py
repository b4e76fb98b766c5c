"""Tiny engines on meshes of forced host devices, and on one device to compare with."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.engine import Engine
from engine.sampling_params import SamplingParams
from tests.tiny_model import make_tiny_checkpoint

UNTIED = {"tie_word_embeddings": False}
ONE_DEVICE = (1, 1, 1, 1, 1)
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "min_token_pad": 32,
    "max_model_len": 128,
    "page_size": 16,
    "kv_cache_bytes": 1 << 20,
}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.2, top_p=0.9, top_k=40, max_tokens=12, ignore_eos=True, n=2, seed=5)


@functools.cache
def checkpoint(**config: Any) -> str:
    folder = Path(tempfile.mkdtemp(prefix="tidemill-tests-")) / "model"
    return make_tiny_checkpoint(folder, **config)


def new_engine(dims: tuple[int, ...], model: dict[str, Any] | None = None, **options: Any) -> Engine:
    return Engine.from_pretrained(
        checkpoint(**(UNTIED if model is None else model)), sharding_axis_dims=dims, **(OPTIONS | options)
    )


def engine(dims: tuple[int, ...], model: dict[str, Any] | None = None, **options: Any) -> Engine:
    """An engine that tests share: compiling one takes seconds."""
    return _kept(dims, json.dumps(UNTIED if model is None else model), **options)


@functools.cache
def _kept(dims: tuple[int, ...], model: str, **options: Any) -> Engine:
    return new_engine(dims, json.loads(model), **options)


def prompts(count: int = 10, seed: int = 0) -> list[list[int]]:
    """Some that share two pages and more with others, and some that share nothing."""
    pick = np.random.default_rng(seed)
    stems = [pick.integers(4, 250, 37).tolist() for _ in range(2)]
    made = []
    for index in range(count):
        stem = stems[index % 3] if index % 3 < 2 else []
        made.append(stem + pick.integers(4, 250, int(pick.integers(1, 30))).tolist())
    return made


def tokens(engine: Engine, sampling: SamplingParams, count: int = 10, seed: int = 0) -> list[Any]:
    outputs = engine.generate(prompts(count, seed), sampling)
    engine.check_integrity()
    return [[sample.token_ids for sample in output.outputs] for output in outputs]
