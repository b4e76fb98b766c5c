"""Blocks of keys and values in on-chip memory: how they come there, and what must not be seen of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.call import Call
from kernels.paged_attention.tpu.integers import quotient, quotient_up, remainder


@dataclass(frozen=True, slots=True)
class PagedTokens:
    """Tokens [begin, end) of the sequence in `slot`, in its pages; `begin` is a page's beginning."""

    call: Call
    slot: Any
    begin: Any
    end: Any

    def move(self, block: Any, buffer: Any, act: Any) -> None:
        """Start (or wait for: `act`) the copies of block `block`, the first being 0, into a buffer."""
        call, shape = self.call, self.call.shape
        size, arrays, scratch = shape.layout.page_size, call.arrays, call.scratch
        first = quotient(self.begin, size) + block * shape.pages_per_block
        count = jnp.minimum(quotient_up(self.end, size) - first, shape.pages_per_block)
        entry = self.slot * shape.table_width + first
        ready = scratch.kv_ready.at[buffer]

        def one(index: Any, carry: None) -> None:
            page = call.plan.page_table[entry + index]
            target = scratch.kv.at[buffer, :, pl.ds(pl.multiple_of(index * size, size), size), :]
            act(pltpu.make_async_copy(call.results.pages.at[page], target, ready))
            if arrays.scales is not None:
                target = scratch.kv_scales.at[buffer, index]
                act(pltpu.make_async_copy(arrays.scales.at[page], target, ready))

        jax.lax.fori_loop(0, count, one, None)


def keep_values(call: Call, buffer: Any, begin: Any, end: Any) -> None:
    """Make the values (and their scales) outside rows [begin, end) of a block zero: a weight of zero does not
    silence a NaN."""
    shape, kv = call.shape, call.scratch.kv
    layout = shape.layout
    tile = layout.sublanes
    lanes = slice(layout.value_operand, layout.value_operand + layout.operand_width)

    def rows(index: Any) -> Any:
        return pl.ds(pl.multiple_of(index * tile, tile), tile)

    def clear(index: Any, carry: None) -> None:
        for head in range(shape.num_kv_heads):
            kv[buffer, head, rows(index), lanes] = jnp.zeros((tile, layout.operand_width), layout.dtype)

    def trim(index: Any) -> None:
        row = index * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, layout.operand_width), 0)
        kept = (row >= begin) & (row < end)
        for head in range(shape.num_kv_heads):
            held = kv[buffer, head, rows(index), lanes]
            kv[buffer, head, rows(index), lanes] = selected(kept, held, jnp.zeros_like(held))

    jax.lax.fori_loop(0, quotient(begin, tile), clear, None)
    jax.lax.fori_loop(quotient_up(end, tile), shape.block // tile, clear, None)
    pl.when(remainder(begin, tile) > 0)(lambda: trim(quotient(begin, tile)))
    pl.when(remainder(end, tile) > 0)(lambda: trim(quotient(end, tile)))
    if call.scratch.kv_scales is not None:
        _keep_value_scales(call, buffer, begin, end)


def _keep_value_scales(call: Call, buffer: Any, begin: Any, end: Any) -> None:
    scales, size = call.scratch.kv_scales, call.shape.layout.page_size

    def one(page: Any, carry: None) -> None:
        held = scales[buffer, page, 1]
        row = page * size + jax.lax.broadcasted_iota(jnp.int32, held.shape, 1)
        scales[buffer, page, 1] = jnp.where((row >= begin) & (row < end), held, 0.0)

    jax.lax.fori_loop(0, call.shape.pages_per_block, one, None)


def selected(mask: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """`where` in 32 bits: masks of narrower vectors are not known to every chip. Exact."""
    wide = jnp.float32 if jnp.issubdtype(yes.dtype, jnp.floating) else jnp.int32
    return jnp.where(mask, yes.astype(wide), no.astype(wide)).astype(yes.dtype)
