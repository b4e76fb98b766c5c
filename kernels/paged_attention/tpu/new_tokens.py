"""The step's own keys and values of prefill chunks: as keys to attend to, and on their way to their pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.call import Call
from kernels.paged_attention.tpu.integers import quotient, quotient_up, rounded_down


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of the step from `begin` on, a multiple of the page size.

    A sequence's new tokens are read from the step's arrays and not from their pages, so that no row waits
    for another core to have written them.
    """

    call: Call
    begin: Any

    def move(self, block: Any, buffer: Any, act: Any) -> None:
        """As `PagedTokens.move`."""
        call, shape = self.call, self.call.shape
        size, arrays, scratch = shape.layout.page_size, call.arrays, call.scratch
        first = (
            quotient(self.begin, size) + 1 + block * shape.pages_per_block
        )  # the rows begin with a page of padding
        window = pl.ds(pl.multiple_of(first * size, size), shape.block)
        ready = scratch.kv_ready.at[buffer]
        act(pltpu.make_async_copy(arrays.new_rows.at[:, window, :], scratch.kv.at[buffer], ready))
        if arrays.new_scales is not None:
            source = arrays.new_scales.at[pl.ds(first, shape.pages_per_block)]
            act(pltpu.make_async_copy(source, scratch.kv_scales.at[buffer], ready))


def write_new_tokens(call: Call, slot: Any) -> None:
    """Write a prefill chunk's keys and values into their pages, a page at a time."""
    plan, size = call.plan, call.shape.layout.page_size
    start, stop = plan.query_start[slot], plan.query_start[slot + 1]
    length = plan.kv_len[slot]
    held = length - (stop - start)

    @pl.when(stop - start > 1)
    def _():
        jax.lax.fori_loop(
            quotient(held, size),
            quotient_up(length, size),
            lambda page, carry: _write_page(call, slot, page, start - held, held, length),
            None,
        )


def _write_page(call: Call, slot: Any, page: Any, shift: Any, held: Any, length: Any) -> None:
    """Write positions [held, length) of a sequence that lie in its page `page`; token = position + shift."""
    shape, scratch, arrays = call.shape, call.scratch, call.arrays
    layout = shape.layout
    size, tile, width = layout.page_size, layout.sublanes, layout.row_width
    number = call.plan.page_table[slot * shape.table_width + page]
    target = call.results.pages.at[number]
    done = scratch.done.at[0]
    # The rows begin `size` before the step's first token, so that this is never negative.
    first = page * size + shift + size
    aligned = pl.multiple_of(rounded_down(first, tile), tile)
    source = arrays.new_rows.at[:, pl.ds(aligned, size + tile), :]
    read = pltpu.make_async_copy(source, scratch.new, done)
    read.start()
    read.wait()
    row = jax.lax.broadcasted_iota(jnp.int32, (size, width), 0)
    position = page * size + row
    is_new = (position >= held) & (position < length)

    @pl.when(page * size < held)
    def _():
        old = pltpu.make_async_copy(target, scratch.page, done)
        old.start()
        old.wait()

    def one(head: Any, carry: None) -> None:
        # Turned by whole 32-bit sublanes: a chip turns no narrower ones, and cannot read at an odd row.
        moved = pltpu.roll(scratch.new[head].astype(jnp.float32), size + tile - (first - aligned), 0)[:size]
        merged = jnp.where(is_new, moved, scratch.page[head].astype(jnp.float32))  # exact
        scratch.page[head] = merged.astype(layout.dtype)

    jax.lax.fori_loop(0, shape.num_kv_heads, one, None)
    write = pltpu.make_async_copy(scratch.page, target, done)
    write.start()
    write.wait()
