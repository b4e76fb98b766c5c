"""Products by the native library."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels.linear.layout import PAIRED_INPUTS, PANEL, PackedWeight, PackedWeights, panel_of_row
from kernels.linear.quantise import GROUP, unpack_nibbles

_MAX_TILE_ROWS = 12  # quantised rows lie in whole tiles
_ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}  # as Linear::Activation in kernels.h


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
    num_tokens, in_dim = x.shape
    panels, scales = weight.arrays if len(weight.arrays) == 2 else (weight.arrays[0], None)
    if scales is not None:
        groups = -(-in_dim // GROUP)
        scratch_bytes = (num_tokens + _MAX_TILE_ROWS - 1) * groups * (2 * GROUP + 4)
    else:
        needs_copy = norm is not None or x.dtype != jnp.float32
        scratch_bytes = 4 * num_tokens * (in_dim + -in_dim % PAIRED_INPUTS) if needs_copy else 0
    nothing = jnp.zeros((0,), jnp.float32)
    call = jax.ffi.ffi_call(
        "tidemill_linear",
        (
            jax.ShapeDtypeStruct((num_tokens, weight.meta.out_dim), out_dtype),
            jax.ShapeDtypeStruct((scratch_bytes,), jnp.uint8),
        ),
    )
    out, _ = call(
        x,
        panels,
        nothing if scales is None else scales,
        nothing if bias is None else bias.astype(jnp.float32),
        jnp.zeros((0,), x.dtype) if residual is None else residual,
        nothing if norm is None else norm[0].astype(jnp.float32),
        weight.index,
        num_rows,
        norm_eps=np.float32(0 if norm is None else norm[1]),
        activation=np.int64(_ACTIVATIONS[activation]),
        bits=np.int64({"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[weight.meta.weight_format]),
    )
    return out


def rows(weights: PackedWeights, layer: int, row_ids: jax.Array) -> jax.Array:
    """f32[T, in]: rows of layer `layer`'s matrix."""
    meta = weights.meta
    panel, place = panel_of_row(row_ids, meta)
    panels = weights.arrays[0]
    if meta.weight_format == "float32":
        return panels[layer, panel, :, place]
    if meta.weight_format == "bfloat16":
        pairs = panels.reshape(*panels.shape[:2], -1, PANEL, 2)[layer, panel, :, place]
        return pairs.reshape(len(row_ids), -1)[:, : meta.in_dim].astype(jnp.float32)
    quads = panels.reshape(*panels.shape[:2], -1, PANEL, 4)[layer, panel, :, place]
    values = jnp.stack(unpack_nibbles(quads), axis=-2) if meta.weight_format == "int4" else quads
    scales = weights.arrays[1][layer, panel, :, place]
    groups = values.reshape(*scales.shape, GROUP).astype(jnp.float32) * scales[..., None]
    return groups.reshape(len(row_ids), -1)[:, : meta.in_dim]
