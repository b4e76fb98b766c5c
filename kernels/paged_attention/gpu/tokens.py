"""Tiles of keys and values, read from one sequence's pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.layout import Pages


class KeysAndValues(NamedTuple):
    """Keys and values of consecutive tokens of one KV head, to be multiplied with their scales."""

    keys: jax.Array  # [keys, vector]
    values: jax.Array  # [keys, vector]
    key_scales: jax.Array | None  # f32[keys]
    value_scales: jax.Array | None


def as_rows(pages: Pages) -> Pages:
    """The same memory as the kernels index it: a row for each page, head and token, in that order."""
    return Pages(
        pages.keys.reshape(-1, pages.keys.shape[-1]),
        pages.values.reshape(-1, pages.values.shape[-1]),
        None if pages.key_scales is None else pages.key_scales.reshape(-1),
        None if pages.value_scales is None else pages.value_scales.reshape(-1),
    )


@dataclass(frozen=True, slots=True)
class PagedTokens:
    """The tokens of one sequence and KV head. All but the first are references and scalars."""

    shape: Geometry
    pages: Any  # `Pages`, as `as_rows` makes them
    page_table: Any
    slot: Any
    head: Any

    def read(self, begin: Any, num_keys: int, end: Any | None = None) -> KeysAndValues:
        """The tokens from position `begin` on: of one page, or more than one page has.

        begin: where pages have `num_keys` tokens or more, a multiple of it.
        end: what lies from there on is not there: its values and their scales are zeros. None: all is there.
        """
        pages = self.pages
        position = begin + jnp.arange(num_keys, dtype=jnp.int32)
        is_there = None if end is None else position < end
        row = self._rows(begin, position, is_there)
        return KeysAndValues(
            self._vectors(pages.keys, row, None),
            self._vectors(pages.values, row, is_there),
            None if pages.key_scales is None else plgpu.load(pages.key_scales.at[row]),
            None if pages.value_scales is None else _masked(pages.value_scales.at[row], is_there),
        )

    def _rows(self, begin: Any, position: jax.Array, is_there: jax.Array | None) -> jax.Array:
        """i32[keys]: the row of each token. What is not there has the row of a token of some page."""
        size, num_keys = self.shape.layout.page_size, position.shape[0]
        if size >= num_keys:
            page = self.page_table[self.slot, jax.lax.div(begin, size)]
            offset = jax.lax.rem(begin, size) + jnp.arange(num_keys, dtype=jnp.int32)
        else:
            page = _masked(self.page_table.at[self.slot, jax.lax.div(position, size)], is_there)
            offset = jax.lax.rem(position, size)
        return (page * self.shape.num_kv_heads + self.head) * size + offset

    def _vectors(self, stored: Any, row: jax.Array, is_there: jax.Array | None) -> jax.Array:
        shape = self.shape
        mask = None if is_there is None else is_there[:, None]
        if shape.vector != shape.layout.head_dim:
            is_number = vector_index(shape) < shape.layout.head_dim
            mask = is_number if mask is None else mask & is_number
        found = _masked(stored.at[row[:, None], vector_index(shape)], mask)
        return found.astype(shape.compute_dtype)


def vector_index(shape: Geometry) -> jax.Array:
    """i32[1, vector]"""
    return jnp.arange(shape.vector, dtype=jnp.int32)[None, :]


def _masked(reference: Any, mask: jax.Array | None) -> jax.Array:
    """What it refers to, and zeros where `mask` (broadcast) is false, where nothing is read."""
    if mask is None:
        return plgpu.load(reference)
    return plgpu.load(
        reference, mask=jnp.broadcast_to(mask, reference.shape), other=jnp.zeros((), reference.dtype)
    )
