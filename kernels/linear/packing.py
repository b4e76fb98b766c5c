"""Packs weights once, at load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cpu import why_absent
from kernels.linear.layout import PANEL, PackedWeights, WeightMeta, to_pairs, to_panels
from kernels.linear.quantise import pack_nibbles, quantise

WEIGHT_FORMATS = ("float32", "bfloat16", "int8", "int4")


def pack_weights(
    weights: Sequence[np.ndarray | jax.Array],
    weight_format: str,
    backend: str,
    *,
    is_gated: bool = False,
    to_device: Callable[[np.ndarray], Any] = jnp.asarray,
) -> PackedWeights:
    """Pack one matrix [out, in] a layer, all of one shape, for `linear` and `gated_linear`.

    Args:
        weights: the layers' matrices; a sequence whose items are made when asked for keeps the peak of memory
            near one copy, since they are packed one at a time.
        weight_format: one of `WEIGHT_FORMATS`; quantise.py says how int8 and int4 round.
        backend: one of `available_backends()`.
        is_gated: the matrix is a gate's rows, then as many of an up; only `gated_linear` takes it then.
        to_device: what makes of a packed array the one that is kept.

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
    pack = _cpu_arrays if backend == "cpu" else _xla_arrays
    if backend == "xla":
        packed = (pack(_checked(weight, meta), meta) for weight in weights)
        return PackedWeights(tuple(tuple(map(to_device, arrays)) for arrays in packed), meta)
    stacked: list[np.ndarray] = []
    for layer, weight in enumerate(weights):
        arrays = pack(_checked(weight, meta), meta)
        if layer == 0:
            stacked = [np.empty((len(weights), *array.shape), array.dtype) for array in arrays]
        for target, array in zip(stacked, arrays, strict=True):
            target[layer] = array
    return PackedWeights(tuple(map(to_device, stacked)), meta)


def _cpu_arrays(matrix: np.ndarray, meta: WeightMeta) -> list[np.ndarray]:
    """Panels and, of quantised weights, scales [panels, in / 64, 16]."""
    if meta.weight_format in ("float32", "bfloat16"):
        panels = to_panels(matrix.astype(jnp.dtype(meta.weight_format)), is_gated=meta.is_gated)
        return [panels if meta.weight_format == "float32" else to_pairs(panels)]
    quantised = quantise(matrix, meta.weight_format)
    panels = to_panels(quantised.values, is_gated=meta.is_gated)
    num_panels, in_dim, _ = panels.shape
    # Four inputs of an output side by side, as instructions that multiply and add bytes want them.
    quads = panels.reshape(num_panels, in_dim // 4, 4, PANEL).transpose(0, 1, 3, 2)
    scales = to_panels(quantised.scales, is_gated=meta.is_gated)
    if meta.weight_format == "int8":
        return [quads.reshape(num_panels, in_dim, PANEL), scales]
    pairs = quads.reshape(num_panels, in_dim // 8, 2, 4 * PANEL)
    packed = pack_nibbles(pairs[:, :, 0], pairs[:, :, 1])
    return [packed.reshape(num_panels, in_dim // 2, PANEL), scales]


def _xla_arrays(matrix: np.ndarray, meta: WeightMeta) -> list[np.ndarray]:
    """The matrix as it is or, quantised, whole numbers [in, rows] and their scales [in / 64, rows]."""
    if meta.weight_format in ("float32", "bfloat16"):
        return [matrix.astype(jnp.dtype(meta.weight_format))]
    values, scales = (np.ascontiguousarray(each.T) for each in quantise(matrix, meta.weight_format))
    return [values if meta.weight_format == "int8" else pack_nibbles(*np.split(values, 2)), scales]


def _checked(weight: np.ndarray | jax.Array, meta: WeightMeta) -> np.ndarray:
    if weight.shape != (meta.num_rows, meta.in_dim):
        expected = (meta.num_rows, meta.in_dim)
        raise ValueError(f"a layer's matrix is {tuple(weight.shape)}, the first layer's {expected}")
    return np.asarray(weight)
