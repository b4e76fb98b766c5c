"""Decodes: each sequence's one query goes over a part of the sequence's own keys, each part by itself.

The parts are merged afterwards (`gpu.combine`), so that a step of few sequences still fills the chip
(Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.paged_attention.gpu.calling import call_kernel
from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.gpu.plan import Plan
from kernels.paged_attention.gpu.rows import BlockRows
from kernels.paged_attention.gpu.softmax import Softmax, add_tiles
from kernels.paged_attention.gpu.tokens import PagedTokens, vector_index
from kernels.paged_attention.layout import Pages


class Parts(NamedTuple):
    """What decodes have seen of parts of their keys."""

    output: jax.Array  # f32[parts, D, N, vector]; unspecified where nothing was seen
    log_total: jax.Array  # f32[parts, D, N], to base 2; `UNSEEN` where nothing was seen

    @classmethod
    def of(cls, shape: Geometry, num_parts: int) -> Parts:
        dims = (num_parts, shape.num_decodes, shape.num_heads)
        shapes = ((*dims, shape.vector), dims)
        return cls._make(jax.ShapeDtypeStruct(each, jnp.float32) for each in shapes)

    def store(self, rows: BlockRows, part: Any, decode: jax.Array, is_row: jax.Array, state: Softmax) -> None:
        """Put each row's result at its decode (i32[rows]), where `is_row`: in a kernel, where these are
        references."""
        output, log_total = cast(Any, self)
        decode = jnp.where(is_row, decode, output.shape[1])
        has_seen = is_row & (state.total > 0)
        place = (part, decode[:, None], rows.query_head[:, None], vector_index(rows.shape))
        mask = jnp.broadcast_to(has_seen[:, None], state.output.shape)
        plgpu.store(output.at[place], state.result(), mask=mask)
        plgpu.store(log_total.at[part, decode, rows.query_head], state.log_total(), mask=is_row)


def attend_decodes(shape: Geometry, q: jax.Array, pages: Pages, plan: Plan) -> Parts:
    """The decodes' parts of the keys that no group reads for them."""
    tile = shape.tiles.decode
    return call_kernel(
        partial(_kernel, shape),
        q,
        pages,
        plan,
        name="paged_attention_decode",
        grid=(shape.num_kv_heads, shape.num_decodes, shape.num_parts),
        out_shape=Parts.of(shape, shape.num_parts),
        warps=tile.warps,
        stages=tile.stages,
    )


def _kernel(shape: Geometry, q: Any, pages: Pages, plan: Plan, parts: Parts) -> None:
    head, decode, part = (pl.program_id(axis) for axis in range(3))
    slot = plan.decode_slot[decode]

    @pl.when(slot < shape.num_slots)
    def _():
        rows = BlockRows(shape, shape.tiles.decode.rows, head)
        is_row = rows.query == 0
        length = plan.kv_len[slot]
        lowest = shape.options.first_visible(length - 1)
        begin = _own_begin(shape, plan.own_begin[decode], lowest) + part * shape.part_len
        token = jnp.broadcast_to(plan.query_start[slot], is_row.shape)
        state = _attend(
            shape,
            rows.load(q, token, is_row),
            PagedTokens(shape, pages, plan.page_table, slot, head),
            lowest,
            begin,
            jnp.minimum(begin + shape.part_len, length),
        )
        parts.store(rows, part, jnp.broadcast_to(decode, is_row.shape), is_row, state)


def _own_begin(shape: Geometry, own_begin: Any, lowest: Any) -> Any:
    """Where the tiles begin: tiles that do not lie in one page may begin anywhere."""
    step = min(shape.tiles.decode.keys, shape.layout.page_size)
    return jnp.maximum(own_begin, lowest - jax.lax.rem(lowest, step))


def _attend(shape: Geometry, q: jax.Array, tokens: PagedTokens, lowest: Any, begin: Any, end: Any) -> Softmax:
    """A query that sees positions from `lowest` on, to the keys at [begin, end)."""
    num_keys = shape.tiles.decode.keys
    state = Softmax.start(q.shape[0], shape.vector)
    if shape.options.is_bounded:
        return add_tiles(state, q, tokens, num_keys, begin, end, lambda keys: keys >= lowest)
    whole = jnp.maximum(end - begin, 0)
    free_end = begin + whole - jax.lax.rem(whole, num_keys)
    state = add_tiles(state, q, tokens, num_keys, begin, free_end)
    return add_tiles(state, q, tokens, num_keys, free_end, end, lambda keys: keys >= 0)
