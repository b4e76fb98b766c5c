"""Checkpoints: from a source a user names to a model, its tokenizer and what identifies them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

# Said by transformers at import where torch is absent, as here it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from engine.checkpoints.chat import (
    encode_text,
    has_chat_template,
    prompt_tokens,
    render_chat,
    render_chat_text,
)
from engine.checkpoints.fingerprint import files_fingerprint, template_fingerprint, tokenizer_fingerprint
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.gguf_model import GgufWeights, gguf_config
from engine.checkpoints.gguf_tokenizer import gguf_tokenizer
from engine.checkpoints.huggingface import (
    SafetensorsWeights,
    has_tokenizer_files,
    hugging_face_config,
    hugging_face_tokenizer,
)
from engine.checkpoints.source import DEFAULT_MODEL, ModelFiles, find_model
from engine.checkpoints.weights import StoredWeights, check_dtype
from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.llama import Llama, abstract_llama

__all__ = [
    "DEFAULT_MODEL",
    "LoadedModel",
    "check_vocabulary",
    "encode_text",
    "has_chat_template",
    "has_tokenizer",
    "load",
    "load_config",
    "load_tokenizer",
    "model_fingerprint",
    "prompt_tokens",
    "render_chat",
    "render_chat_text",
    "template_fingerprint",
    "tokenizer_fingerprint",
]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run. `tokenizer` is a transformers fast tokenizer.

    `fingerprint` covers the weights and the config, not the tokenizer; `source` is what the user wrote.
    """

    model: Llama
    config: ModelConfig
    tokenizer: Any
    fingerprint: str
    name: str
    source: str
    stored: StoredWeights | None = None
    """The weights, where they are still in the checkpoint; `model` then has shapes and no arrays."""


def load(
    source: str, *, revision: str | None = None, dtype: str = "float32", defers_weights: bool = False
) -> LoadedModel:
    """Load a model's weights as `dtype` (float32, bfloat16, float16), its config and its tokenizer.

    `source` is `smollm2-135m-instruct`, a .gguf file, a Hugging Face folder, an fsspec URL of either, or a
    hub id with the `revision` it is pinned to. Weights are read tensor by tensor; with `defers_weights` an
    engine reads them (`LoadedModel.stored`), each straight into its shards on a mesh. ModelError, on one
    line, for whatever is missing, damaged or not implemented.
    """
    check_dtype(dtype)
    files = find_model(source, revision)
    if files.is_gguf:
        header = read_gguf_header(files.path)
        config, tokenizer, weights = gguf_config(header), gguf_tokenizer(header), GgufWeights(header)
        hashed = [files.path]
    else:
        config = hugging_face_config(files.path)
        tokenizer = hugging_face_tokenizer(files.path)
        weights = SafetensorsWeights(files.path)
        hashed = [*_config_files(files), *weights.files]
    check_vocabulary(files.path, tokenizer, config)
    stored = StoredWeights(config, weights, dtype)
    model = abstract_llama(config, jnp.dtype(dtype)) if defers_weights else stored.load()
    fingerprint = files_fingerprint(hashed)
    kept = stored if defers_weights else None
    return LoadedModel(model, config, tokenizer, fingerprint, files.name, source, kept)


def load_tokenizer(source: str, *, revision: str | None = None) -> Any:
    """The tokenizer alone, as `load` gives it; no weights are read."""
    files = find_model(source, revision)
    if files.is_gguf:
        return gguf_tokenizer(read_gguf_header(files.path))
    return hugging_face_tokenizer(files.path)


def has_tokenizer(source: str, *, revision: str | None = None) -> bool:
    """Whether the model comes with a tokenizer; a folder with nothing but a config.json does not."""
    files = find_model(source, revision)
    return files.is_gguf or has_tokenizer_files(files.path)


def load_config(source: str, *, revision: str | None = None) -> ModelConfig:
    """The sizes and switches alone, as `load` gives them; no weights are read."""
    files = find_model(source, revision)
    return gguf_config(read_gguf_header(files.path)) if files.is_gguf else hugging_face_config(files.path)


def model_fingerprint(source: str, *, revision: str | None = None) -> str:
    """What `load` would give as the model's fingerprint, without loading it."""
    files = find_model(source, revision)
    if files.is_gguf:
        return files_fingerprint([files.path])
    return files_fingerprint([*_config_files(files), *SafetensorsWeights(files.path).files])


def _config_files(files: ModelFiles) -> list[Path]:
    """The JSON files that decide what is computed and where it stops."""
    return [
        path for name in ("config.json", "generation_config.json") if (path := files.path / name).is_file()
    ]


def check_vocabulary(where: Path | str, tokenizer: Any, config: ModelConfig) -> None:
    """A tokenizer may know fewer tokens than the model has rows (padding), never more: else ModelError."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        raise ModelError(
            f"{where}: the tokenizer has token id {highest} and the model only {config.vocab_size} rows; "
            "they do not belong together"
        )
