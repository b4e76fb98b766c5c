"""Packs weights once, at load."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cpu import why_absent
from kernels.linear.layout import PANEL, PackedWeights, WeightMeta, padded_panels, to_panels

WEIGHT_FORMATS = ("float32", "bfloat16")


def pack_weights(
    weights: Sequence[np.ndarray | jax.Array], weight_format: str, backend: str, *, is_gated: bool = False
) -> PackedWeights:
    """Pack one matrix [out, in] a layer, all of one shape, for `linear` and `gated_linear`.

    Args:
        weights: the layers' matrices; a sequence whose items are made when asked for keeps the peak of memory
            near one copy, since they are packed one at a time.
        weight_format: "float32" or "bfloat16".
        backend: one of `available_backends()`.
        is_gated: the matrix is a gate's rows, then as many of an up; only `gated_linear` takes it then.

    Raises ValueError for an unknown format or backend, or matrices that do not fit together.
    """
    if weight_format not in WEIGHT_FORMATS:
        raise ValueError(
            f"weight format {weight_format!r} is unknown; give one of {', '.join(WEIGHT_FORMATS)}"
        )
    if backend not in ("cpu", "xla"):
        raise ValueError(f"linear backend {backend!r} is unknown; give 'cpu' or 'xla'")
    if backend == "cpu" and (reason := why_absent()) is not None:
        raise ValueError(f"there is no native library for the linear backend 'cpu': {reason}")
    if len(weights) == 0:
        raise ValueError("pack_weights was given no matrices; give one a layer")
    rows, in_dim = weights[0].shape
    if is_gated and rows % 2:
        raise ValueError(f"a gated matrix has {rows} rows; give as many for the gate as for the up")
    out_dim = rows // 2 if is_gated else rows
    meta = WeightMeta(in_dim, out_dim, len(weights), is_gated, weight_format, backend)
    dtype = jnp.dtype(weight_format)
    if backend == "xla":
        return PackedWeights(tuple(jnp.asarray(_checked(w, meta), dtype) for w in weights), meta)
    panels = np.empty((len(weights), padded_panels(rows, is_gated=is_gated), in_dim, PANEL), dtype)
    for layer, weight in enumerate(weights):
        panels[layer] = to_panels(np.asarray(_checked(weight, meta)).astype(dtype), is_gated=is_gated)
    return PackedWeights((jnp.asarray(panels),), meta)


def _checked(weight: np.ndarray | jax.Array, meta: WeightMeta) -> np.ndarray | jax.Array:
    if weight.shape != (meta.num_rows, meta.in_dim):
        expected = (meta.num_rows, meta.in_dim)
        raise ValueError(f"a layer's matrix is {tuple(weight.shape)}, the first layer's {expected}")
    return weight
