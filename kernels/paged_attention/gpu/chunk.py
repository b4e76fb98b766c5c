"""Prefill chunks: a block of one chunk's queries goes over all keys before them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.paged_attention.gpu.calling import call_kernel, like
from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.gpu.plan import Plan
from kernels.paged_attention.gpu.rows import BlockRows
from kernels.paged_attention.gpu.softmax import Softmax, add_tiles
from kernels.paged_attention.gpu.tokens import PagedTokens
from kernels.paged_attention.layout import Pages


def attend_chunks(
    shape: Geometry, out: jax.Array, q: jax.Array, pages: Pages, plan: Plan, sinks: jax.Array | None
) -> jax.Array:
    """`out` [T, N, H] with the tokens of prefill chunks filled in. The pages hold the step's tokens."""
    tile = shape.tiles.chunk
    return call_kernel(
        partial(_kernel, shape),
        out,
        q,
        pages,
        plan,
        sinks,
        name="paged_attention_chunk",
        grid=(shape.num_kv_heads, shape.num_chunk_blocks),
        out_shape=like(out),
        warps=tile.warps,
        stages=tile.stages,
        aliases={0: 0},
    )


def _kernel(shape: Geometry, _: Any, q: Any, pages: Pages, plan: Plan, sinks: Any, out: Any) -> None:
    head, block = pl.program_id(0), pl.program_id(1)
    slot = plan.chunk_slot[block]

    @pl.when(slot < shape.num_slots)
    def _():
        rows = BlockRows(shape, shape.tiles.chunk.rows, head)
        first = plan.chunk_first[block]
        start = plan.query_start[slot]
        num_queries = plan.query_start[slot + 1] - start
        before = plan.kv_len[slot] - num_queries  # tokens of the sequence from earlier steps
        query = first + rows.query
        is_row = (query < num_queries) & (rows.query < shape.chunk_queries)
        state = _attend(
            shape,
            rows.load(q, start + query, is_row),
            Softmax.start(rows.num_rows, shape.vector, rows.sinks(sinks, is_row)),
            PagedTokens(shape, pages, plan.page_table, slot, head),
            before + query,
            before + first,
            before + jnp.minimum(first + shape.chunk_queries, num_queries),
        )
        rows.store(out, start + query, is_row, state.result())


def _attend(
    shape: Geometry,
    q: jax.Array,
    state: Softmax,
    tokens: PagedTokens,
    position: jax.Array,
    first: Any,
    end: Any,
) -> Softmax:
    """Queries at `position` i32[rows], from `first` on and before `end`.

    The tiles that all of them see whole, most of them, need no mask.
    """
    num_keys = shape.tiles.chunk.keys
    lowest = shape.options.first_visible(position)[:, None]

    def seen(keys: jax.Array) -> jax.Array:
        is_seen = keys <= position[:, None]
        return is_seen & (keys >= lowest) if shape.options.is_bounded else is_seen

    add = partial(add_tiles, q=q, tokens=tokens, num_keys=num_keys)
    free_end = _rounded_down(first + 1, num_keys)
    if not shape.options.is_bounded:
        state = add(state, begin=0, end=free_end)
        return add(state, begin=free_end, end=end, seen=seen)
    begin = _rounded_down(shape.options.first_visible(first), num_keys)
    last_lowest = shape.options.first_visible(end - 1)
    free_begin = _rounded_down(last_lowest + (num_keys - 1), num_keys)
    free_end = jnp.maximum(free_begin, free_end)
    state = add(state, begin=begin, end=jnp.minimum(free_begin, end), seen=seen)
    state = add(state, begin=free_begin, end=free_end)
    return add(state, begin=free_end, end=end, seen=seen)


def _rounded_down(x: Any, by: int) -> Any:
    """The largest multiple of `by` that is x >= 0 or less."""
    return x - jax.lax.rem(x, by)
