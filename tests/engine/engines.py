"""Tiny engines with one compiled step each, kept for the process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from engine import checkpoints
from engine.config import EngineConfig
from engine.engine import Engine
from engine.outputs import RequestOutput
from tests.tiny_model import make_tiny_checkpoint

PAGE_BYTES = 2 * 2 * 16 * 4 * 2
"""Of one token over the tiny model's two layers: keys and values, two KV heads of 16, float32."""


TINY = EngineConfig(
    max_num_seqs=8,
    max_num_batched_tokens=32,
    min_token_pad=32,
    max_model_len=128,
    page_size=16,
    kv_cache_bytes=48 * 16 * PAGE_BYTES,
)


@functools.cache
def varied_model() -> checkpoints.LoadedModel:
    """The tiny checkpoint with a head of its own, so that its greedy text does not repeat one token."""
    folder = Path(tempfile.mkdtemp(prefix="tidemill-tests-")) / "model"
    return checkpoints.load(str(make_tiny_checkpoint(folder, tie_word_embeddings=False)))


@functools.cache
def tiny_engine(num_pages: int = 48, **options: Any) -> Engine:
    """An engine of 8 sequences, steps of 32 tokens, 128 tokens a sequence and `num_pages` pages of 16."""
    page_size = options.get("page_size", 16)
    defaults: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "min_token_pad": 32,
        "max_model_len": 128,
        "page_size": page_size,
        "kv_cache_bytes": num_pages * page_size * PAGE_BYTES,
    }
    return Engine(varied_model(), EngineConfig(**(defaults | options)))


@functools.cache
def engine_with(**options: Any) -> Engine:
    """Such an engine with 48 pages and these options of `Engine`, kept like the others."""
    return Engine(varied_model(), TINY, **options)


def last_outputs(engine: Engine) -> dict[str, RequestOutput]:
    """Step to the end; the last output of each request."""
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]
