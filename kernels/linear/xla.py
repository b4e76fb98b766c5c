"""Products by XLA, on any device.

Weights lie [out, in] and the product is x @ w.T: on a CPU, XLA then gives a row the same bits at every
number of rows from 2 on (an [in, out] product goes to another kernel at 16 rows and less, which adds in
another order), so fewer rows than `MIN_STABLE_ROWS` are filled up to it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.linear.layout import PackedWeight, PackedWeights
from kernels.linear.reference import ACTIVATIONS

MIN_STABLE_ROWS = 8


def _project(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [T, in] @ matrix [out, in].T: f32[T, out]; f32 in full (a GPU or TPU would else round)."""
    precision = jax.lax.Precision.HIGHEST if matrix.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, matrix, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _normalised(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm in f32. The sum is a product with ones, which adds in one order at every number of rows."""
    wide = x.astype(jnp.float32)
    total = _project(wide * wide, jnp.ones((8, x.shape[1]), jnp.float32))[:, :1]
    return wide * jax.lax.rsqrt(total / x.shape[1] + eps) * weight


def multiply(
    x: jax.Array,
    weight: PackedWeight,
    bias: jax.Array | None,
    activation: str | None,
    residual: jax.Array | None,
    norm: tuple[jax.Array, float] | None,
    num_rows: jax.Array,
) -> jax.Array:
    """As `kernels.linear.linear`, or gated by `activation`."""
    num_tokens, dtype = x.shape[0], x.dtype
    is_valid = (jnp.arange(num_tokens) < num_rows)[:, None]
    x = jnp.pad(x, ((0, max(0, MIN_STABLE_ROWS - num_tokens)), (0, 0)))
    if norm is not None:
        x = _normalised(x, *norm)
    if weight.meta.weight_format == "bfloat16" and dtype == jnp.bfloat16:
        x = x.astype(jnp.bfloat16)
    else:
        x = x.astype(jnp.float32)
    branches = [lambda x, matrix=matrix: _project(x, matrix.astype(x.dtype)) for matrix in weight.arrays]
    y = branches[0](x) if len(branches) == 1 else jax.lax.switch(weight.index, branches, x)
    y = y[:num_tokens]
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        gate, up = jnp.split(y, 2, axis=-1)
        y = ACTIVATIONS[activation](gate) * up
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return jnp.where(is_valid, y, 0).astype(dtype)


def rows(weights: PackedWeights, layer: int, row_ids: jax.Array) -> jax.Array:
    """f32[T, in]: rows of layer `layer`'s matrix."""
    return weights.arrays[layer].at[row_ids].get(mode="clip").astype(jnp.float32)
