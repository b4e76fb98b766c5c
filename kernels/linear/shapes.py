"""What packed weights look like, without any weights: to compile for, and to count."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.linear.layout import PAIRED_INPUTS, PANEL, PackedWeights, WeightMeta, padded_panels
from kernels.linear.quantise import GROUP


def abstract_weights(
    rows: int, in_dim: int, num_layers: int, weight_format: str, backend: str, *, is_gated: bool = False
) -> PackedWeights:
    """What `pack_weights` makes of `num_layers` matrices [rows, in], with shapes in the place of arrays."""
    out_dim = rows // 2 if is_gated else rows
    meta = WeightMeta(in_dim, out_dim, num_layers, is_gated, weight_format, backend)
    if backend == "xla":
        return PackedWeights((_xla_shapes(meta),) * num_layers, meta)
    stacked = tuple(jax.ShapeDtypeStruct((num_layers, *x.shape), x.dtype) for x in _cpu_shapes(meta))
    return PackedWeights(stacked, meta)


def _xla_shapes(meta: WeightMeta) -> tuple[jax.ShapeDtypeStruct, ...]:
    if meta.weight_format in ("float32", "bfloat16"):
        return (jax.ShapeDtypeStruct((meta.num_rows, meta.in_dim), jnp.dtype(meta.weight_format)),)
    num_groups = -(-meta.in_dim // GROUP)
    values = num_groups * GROUP // (1 if meta.weight_format == "int8" else 2)
    return (
        jax.ShapeDtypeStruct((values, meta.num_rows), jnp.int8),
        jax.ShapeDtypeStruct((num_groups, meta.num_rows), jnp.float32),
    )


def _cpu_shapes(meta: WeightMeta) -> tuple[jax.ShapeDtypeStruct, ...]:
    num_panels = padded_panels(meta.num_rows, is_gated=meta.is_gated)
    if meta.weight_format in ("float32", "bfloat16"):
        filled = 0 if meta.weight_format == "float32" else -meta.in_dim % PAIRED_INPUTS
        shape = (num_panels, meta.in_dim + filled, PANEL)
        return (jax.ShapeDtypeStruct(shape, jnp.dtype(meta.weight_format)),)
    num_groups = -(-meta.in_dim // GROUP)
    inputs = num_groups * GROUP // (1 if meta.weight_format == "int8" else 2)
    return (
        jax.ShapeDtypeStruct((num_panels, inputs, PANEL), jnp.int8),
        jax.ShapeDtypeStruct((num_panels, num_groups, PANEL), jnp.float32),
    )
