"""Prefix groups: several decodes at once go over the keys that they share (Hydragen, Juravsky et al. 2024).

A thread block has decodes that are next to each other. It goes over a part of the keys of each group that
some of them are in, masked for the others. Groups along a prefix tree so need no passes of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.paged_attention.gpu.calling import call_kernel
from kernels.paged_attention.gpu.decode import Parts
from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.gpu.plan import Plan
from kernels.paged_attention.gpu.rows import BlockRows
from kernels.paged_attention.gpu.softmax import Softmax, add_tiles
from kernels.paged_attention.gpu.tokens import PagedTokens
from kernels.paged_attention.layout import Pages

_FAR = 2**30  # past any position


def attend_groups(shape: Geometry, q: jax.Array, pages: Pages, plan: Plan) -> Parts:
    """The decodes' parts of the keys that their groups share."""
    tile = shape.tiles.group
    return call_kernel(
        partial(_kernel, shape),
        q,
        pages,
        plan,
        name="paged_attention_group",
        grid=(shape.num_kv_heads, shape.num_member_blocks, shape.num_group_parts),
        out_shape=Parts.of(shape, shape.num_group_parts),
        warps=tile.warps,
        stages=tile.stages,
    )


def _kernel(shape: Geometry, q: Any, pages: Pages, plan: Any, parts: Parts) -> None:
    head, block, part = (pl.program_id(axis) for axis in range(3))
    rows = BlockRows(shape, shape.tiles.group.rows, head)
    first = block * shape.members
    decode = first + rows.query
    is_row = (decode < shape.num_decodes) & (rows.query < shape.members)
    slot = plgpu.load(plan.decode_slot.at[decode], mask=is_row, other=shape.num_slots)
    is_decode = slot < shape.num_slots
    token = plgpu.load(plan.query_start.at[slot], mask=is_decode, other=0)
    length = plgpu.load(plan.kv_len.at[slot], mask=is_decode, other=1)
    lowest = shape.options.first_visible(length - 1)
    block_lowest = _block_lowest(shape, jnp.where(is_decode, lowest, _FAR)) if shape.options.is_bounded else 0
    queries = rows.load(q, token, is_decode)

    def attend(group: Any, state: Softmax) -> Softmax:
        group_first, group_last = plan.group_first[group], plan.group_last[group]
        is_near = (group_first < first + shape.members) & (group_last > first)
        is_member = (decode >= group_first) & (decode < group_last)

        def seen(keys: jax.Array) -> jax.Array:
            is_seen = jnp.broadcast_to(is_member[:, None], (rows.num_rows, keys.shape[1]))
            return is_seen & (keys >= lowest[:, None]) if shape.options.is_bounded else is_seen

        end = plan.group_end[group]
        begin = jnp.minimum(jnp.maximum(plan.group_begin[group], block_lowest), end)
        begin, end = _part_of(shape, begin, end, part)
        tokens = PagedTokens(shape, pages, plan.page_table, plan.group_slot[group], head)
        end = jnp.where(is_near, end, begin)
        return add_tiles(state, queries, tokens, shape.tiles.group.keys, begin, end, seen)

    start = Softmax.start(rows.num_rows, shape.vector)
    state = jax.lax.fori_loop(0, plan.num_groups[0], attend, start)
    parts.store(rows, part, decode, is_row, state)


def _block_lowest(shape: Geometry, lowest: jax.Array) -> Any:
    """Where tiles may begin, at or before the lowest position that a row sees."""
    found = jnp.min(lowest)
    return found - jax.lax.rem(found, min(shape.tiles.group.keys, shape.layout.page_size))


def _part_of(shape: Geometry, begin: Any, end: Any, part: Any) -> tuple[Any, Any]:
    """The part `part` of the positions [begin, end): whole tiles, but for the last one."""
    num_keys = shape.tiles.group.keys
    tiles = jax.lax.div(end - begin + (num_keys - 1), num_keys)
    each = jax.lax.div(tiles + (shape.num_group_parts - 1), shape.num_group_parts) * num_keys
    first = jnp.minimum(begin + part * each, end)
    return first, jnp.minimum(first + each, end)
