"""Products by XLA, on any device.

Weights lie [out, in] and the product is x @ w.T: on a CPU, XLA then gives a row the same bits at every
number of rows from 2 on (an [in, out] product goes to another kernel at 16 rows and less, which adds in
another order), so fewer rows than `MIN_STABLE_ROWS` are filled up to it. Quantised weights are
widened for each product, and activations stay as they are. They lie [in, out]: if inputs that share a scale
lay side by side, a TPU's compiler would turn every matrix around in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from kernels.linear.layout import PackedWeight, PackedWeights, WeightMeta
from kernels.linear.quantise import GROUP, unpack_nibbles
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
    out_dtype: jnp.dtype,
) -> jax.Array:
    """As `kernels.linear.linear`, or gated by `activation`."""
    num_tokens, dtype = x.shape[0], x.dtype
    is_valid = (jnp.arange(num_tokens) < num_rows)[:, None]
    x = jnp.pad(x, ((0, max(0, MIN_STABLE_ROWS - num_tokens)), (0, 0)))
    if norm is not None:
        x = _normalised(x, *norm)
    x = x.astype(dtype if weight.meta.weight_format != "float32" else jnp.float32)
    branches = [partial(_product, arrays, weight.meta) for arrays in weight.arrays]
    y = branches[0](x) if len(branches) == 1 else jax.lax.switch(weight.index, branches, x)
    y = y[:num_tokens]
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        gate, up = jnp.split(y, 2, axis=-1)
        y = ACTIVATIONS[activation](gate) * up
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return jnp.where(is_valid, y, 0).astype(out_dtype)


def _widened(arrays: Sequence[jax.Array], meta: WeightMeta) -> jax.Array:
    """f32[in, rows] of a quantised matrix, or of some of its rows."""
    values, scales = arrays
    if meta.weight_format == "int4":
        values = jnp.concatenate(unpack_nibbles(values))
    groups = values.reshape(len(scales), GROUP, -1).astype(jnp.float32) * scales[:, None]
    return groups.reshape(len(values), -1)[: meta.in_dim]


def _product(arrays: tuple[jax.Array, ...], meta: WeightMeta, x: jax.Array) -> jax.Array:
    """One layer's product, f32[T, rows]."""
    if meta.weight_format in ("float32", "bfloat16"):
        return _project(x, arrays[0].astype(x.dtype))
    matrix = _widened(arrays, meta).astype(x.dtype).T
    # A CPU is to have the matrix [out, in], for the sake of the bits; XLA would multiply by it as it lies.
    matrix = jax.lax.platform_dependent(matrix, cpu=jax.lax.optimization_barrier, default=lambda each: each)
    return _project(x, matrix)


def rows(weights: PackedWeights, layer: int, row_ids: jax.Array) -> jax.Array:
    """f32[T, in]: rows of layer `layer`'s matrix."""
    arrays, meta = weights.arrays[layer], weights.meta
    if meta.weight_format in ("float32", "bfloat16"):
        return arrays[0].at[row_ids].get(mode="clip").astype(jnp.float32)
    chosen = [array.at[:, row_ids].get(mode="clip") for array in arrays]
    return _widened(chosen, meta).T
