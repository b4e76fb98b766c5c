"""The two products of attention, for any page dtype, and the running softmax between them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.paged_attention.layout import AttentionOptions
from kernels.paged_attention.tpu.call import Call
from kernels.paged_attention.tpu.layout import LANES


def contract_keys(call: Call, buffer: Any, head: Any, queries: jax.Array) -> jax.Array:
    """queries [rows, Q] with a block's keys of one KV head -> f32[rows, block]."""
    keys = call.scratch.kv[buffer, head, :, : call.shape.layout.operand_width].astype(queries.dtype)
    logits = _product(queries, keys, 1)
    return logits if call.scratch.kv_scales is None else logits * _block_scales(call, buffer, 0, head)


def contract_values(call: Call, buffer: Any, head: Any, weights: jax.Array) -> jax.Array:
    """weights f32[rows, block] with a block's values of one KV head -> f32[rows, Q]."""
    layout, dtype = call.shape.layout, call.shape.compute_dtype
    if call.scratch.kv_scales is not None:
        weights = weights * _block_scales(call, buffer, 1, head)
    begin = layout.value_operand
    values = call.scratch.kv[buffer, head, :, begin : begin + layout.operand_width].astype(dtype)
    return _product(weights.astype(dtype), values, 0)


def _product(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def _block_scales(call: Call, buffer: Any, kind: int, head: Any) -> jax.Array:
    """f32[1, block], the scales of a block's keys (kind 0) or values (1) of one KV head."""
    scales = call.scratch.kv_scales
    pages = [scales[buffer, page, kind, pl.ds(head, 1), :] for page in range(call.shape.pages_per_block)]
    return jnp.concatenate(pages, axis=1)


def capped(options: AttentionOptions, logits: jax.Array) -> jax.Array:
    """The logits as the running maximum is kept in: without a soft cap the scale is left to the exponent."""
    if options.soft_cap is None:
        return logits
    return options.soft_cap * jnp.tanh(logits * (options.scale / options.soft_cap))


def lane_tiles(x: jax.Array) -> list[jax.Array]:
    """x [rows, n * 128] as n vectors of 128 lanes."""
    return [x[:, begin : begin + LANES] for begin in range(0, x.shape[1], LANES)]


def softmax_update(
    before: jax.Array, total: jax.Array, logits: list[jax.Array], exponent: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Take one block's logits, a list of f32[rows, 128], into a running softmax (Milakov, Gimelshein 2018).

    `before` f32[rows, 128] is the maximum so far, `total` f32[rows, 128] the sums by lane. Returns the new
    maximum, what everything summed before is to be multiplied by, the new sums, and the weights
    f32[rows, block].
    """
    highest = logits[0]
    for part in logits[1:]:
        highest = jnp.maximum(highest, part)
    maximum = jnp.maximum(before, jnp.max(highest, axis=1, keepdims=True))
    decay = jnp.exp2((before - maximum) * exponent)
    weights = [jnp.exp2((part - maximum) * exponent) for part in logits]
    total = total * decay
    for part in weights:
        total = total + part
    return maximum, decay, total, jnp.concatenate(weights, axis=1)


def finished(total: jax.Array, output: jax.Array) -> jax.Array:
    """f32[rows, Q], the weighted mean of a running softmax whose sums are to be added up over lanes.

    Zero where nothing was seen.
    """
    total = jnp.sum(total, axis=1, keepdims=True)
    return output * jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
