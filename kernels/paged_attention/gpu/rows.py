"""The rows of a thread block: several queries, with all query heads of one KV head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.gpu.tokens import vector_index


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Row `r` is query `r // ratio` of the block, query head `r % ratio` of its KV head."""

    shape: Geometry
    num_rows: int
    head: Any  # the KV head

    @property
    def query(self) -> jax.Array:
        """i32[rows]"""
        return jax.lax.div(self._row, self.shape.ratio)

    @property
    def query_head(self) -> jax.Array:
        """i32[rows], among all query heads"""
        return self.head * self.shape.ratio + jax.lax.rem(self._row, self.shape.ratio)

    @property
    def _row(self) -> jax.Array:
        return jnp.arange(self.num_rows, dtype=jnp.int32)

    def load(self, q: Any, token: jax.Array, is_row: jax.Array) -> jax.Array:
        """[rows, vector] of q [T, N, H] at each row's token, as products take it; zeros where no `is_row`."""
        place, mask = self._place(token, is_row)
        found = plgpu.load(q.at[place], mask=mask, other=jnp.zeros((), q.dtype))
        return found.astype(self.shape.compute_dtype)

    def store(self, out: Any, token: jax.Array, is_row: jax.Array, x: jax.Array) -> None:
        """Put x [rows, vector] at each row's token of out [T, N, H], where `is_row`."""
        # What is masked gets a place past the end: interpreted, it would be written back as it was.
        place, mask = self._place(jnp.where(is_row, token, out.shape[0]), is_row)
        plgpu.store(out.at[place], x.astype(out.dtype), mask=mask)

    def sinks(self, sinks: Any, is_row: jax.Array) -> jax.Array | None:
        """f32[rows] of sinks f32[N], if there are any."""
        return None if sinks is None else plgpu.load(sinks.at[self.query_head], mask=is_row, other=0.0)

    def _place(self, token: jax.Array, is_row: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        index = vector_index(self.shape)
        mask = is_row[:, None] & (index < self.shape.layout.head_dim)
        return (token[:, None], self.query_head[:, None], index), mask
