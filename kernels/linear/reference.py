"""What a product computes, plainly: the specification of every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def normalise(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467) of x [T, in], in f32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * weight


def linear(
    x: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    residual: jax.Array | None = None,
    norm: tuple[jax.Array, float] | None = None,
    num_rows: int | None = None,
    is_narrow: bool = False,
) -> jax.Array:
    """x [T, in] times f32 `matrix` [rows, in], transposed; with `activation` gated, the gate's rows first.

    `is_narrow`: x and the matrix that was packed are bfloat16, so what is multiplied is.
    """
    wide = normalise(x, *norm) if norm else x.astype(jnp.float32)
    if is_narrow:
        wide = wide.astype(jnp.bfloat16).astype(jnp.float32)
    y = jnp.matmul(wide, matrix.astype(jnp.float32).T, precision="highest")
    if bias is not None:
        y = y + bias
    if activation is not None:
        gate, up = jnp.split(y, 2, axis=-1)
        y = ACTIVATIONS[activation](gate) * up
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    if num_rows is not None:
        y = jnp.where(jnp.arange(len(x))[:, None] < num_rows, y, 0)
    return y.astype(x.dtype)
