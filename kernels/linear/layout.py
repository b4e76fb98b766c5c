"""How packed weights lie, and what they are called by.

For the native backend a matrix [out, in] is cut into panels of 16 outputs, [panel, in, 16], so that a product
reads it in order whatever the width of the CPU's vectors. In bfloat16 two inputs of an output lie side
by side, [panel, in / 2, 16, 2], as instructions that multiply and add pairs want them. The last panels are
filled up with zeros to an even number of panels. Of a gated pair of matrices panels alternate: 16 outputs of
the gate, the same 16 of the up. For XLA matrices stay as they are, but quantised ones, which lie [in, out]
(`kernels.linear.xla`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PANEL = 16
PAIRED_INPUTS = 32
"""The inputs of bfloat16 panels are filled up to a multiple of it, as linear_float.h has it."""


@dataclass(frozen=True, slots=True)
class WeightMeta:
    """What is static about packed weights.

    `out_dim` counts a product's results: of gated weights half of the matrix's rows.
    """

    in_dim: int
    out_dim: int
    num_layers: int
    is_gated: bool
    weight_format: str
    backend: str

    @property
    def num_rows(self) -> int:
        """Rows of the matrix that was packed."""
        return self.out_dim * (2 if self.is_gated else 1)


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["meta"])
@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Matrices of one shape, one a layer, packed for a backend.

    `arrays` belong to the backend: for "cpu" the panels of all layers in one array (and their scales in
    another), for "xla" as many tuples as layers (slices of one array would be copied, every step, on a CPU).
    """

    arrays: tuple[Any, ...]
    meta: WeightMeta

    def layer(self, index: jax.Array | int) -> PackedWeight:
        """The matrix of layer `index` (i32 scalar, may be traced); nothing is copied."""
        return PackedWeight(self.arrays, jnp.asarray(index, jnp.int32), self.meta)

    @property
    def num_bytes(self) -> int:
        """Bytes that the packed weights take."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self.arrays))


@partial(jax.tree_util.register_dataclass, data_fields=["arrays", "index"], meta_fields=["meta"])
@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One layer's matrix out of `PackedWeights`."""

    arrays: tuple[Any, ...]
    index: jax.Array  # i32[]
    meta: WeightMeta


def padded_panels(num_rows: int, *, is_gated: bool) -> int:
    """How many panels a matrix of `num_rows` rows takes."""
    half = num_rows // 2
    return 2 * -(-half // PANEL) if is_gated else 2 * -(-num_rows // (2 * PANEL))


def to_panels(matrix: np.ndarray, *, is_gated: bool) -> np.ndarray:
    """[rows, in] -> [panels, in, 16], contiguous, filled up with zeros."""
    rows, in_dim = matrix.shape
    num_panels = padded_panels(rows, is_gated=is_gated)
    panels = np.zeros((num_panels, in_dim, PANEL), matrix.dtype)
    halves = [(matrix[: rows // 2], panels[0::2]), (matrix[rows // 2 :], panels[1::2])]
    for part, target in halves if is_gated else [(matrix, panels)]:
        whole, rest = divmod(len(part), PANEL)
        target[:whole] = part[: whole * PANEL].reshape(whole, PANEL, in_dim).transpose(0, 2, 1)
        if rest:
            target[whole, :, :rest] = part[whole * PANEL :].T
    return panels


def to_pairs(panels: np.ndarray) -> np.ndarray:
    """[panels, in, 16] -> [panels, in filled up, 16], each two inputs of an output side by side."""
    num_panels, in_dim, _ = panels.shape
    filled = np.pad(panels, ((0, 0), (0, -in_dim % PAIRED_INPUTS), (0, 0)))
    pairs = filled.reshape(num_panels, -1, 2, PANEL).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(pairs).reshape(filled.shape)


def panel_of_row(row: jax.Array, meta: WeightMeta) -> tuple[jax.Array, jax.Array]:
    """Where a row of the packed matrix lies: (panel, place within it), of `row`'s shape."""
    if not meta.is_gated:
        return row // PANEL, row % PANEL
    is_up = row >= meta.out_dim
    row = jnp.where(is_up, row - meta.out_dim, row)
    return row // PANEL * 2 + is_up.astype(row.dtype), row % PANEL
