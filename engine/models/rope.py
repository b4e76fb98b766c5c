"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with the halves of a head rotated together.

Pair i of a head is (x[i], x[i + H/2]), as Hugging Face stores weights; llama.cpp's interleaved pairs are put
into this order when a GGUF file is read.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair, f32[H/2], with the configured scaling applied."""
    half = config.head_dim // 2
    inverse = config.rope_theta ** -(np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse.astype(np.float32)
    if scaling.kind == "linear":
        return (inverse / scaling.factor).astype(np.float32)
    if scaling.kind == "factors":
        return (inverse / np.asarray(scaling.factors, np.float64)).astype(np.float32)
    # llama3: by how often a pair turns within the original context: rarely -> stretched, often -> kept.
    turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (inverse * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every pair's angle at `positions` i32[T]: two f32[T, 1, H/2]."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)[None, :]
    return jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [T, N, H] by the tables of `rope_tables`, in f32; the result has x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
