"""Rows with one query: each reads the pages that no group has read for it, writes its new token, and attends.

All KV heads of a block are computed in one turn of the loop. Their keys and values pass through the matrix
unit as its stationary operand; the few queries of a KV head are the moving one. The running softmax is in
scratch memory between turns: carried in registers, it would not leave enough of them on the older chips.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.blocks import PagedTokens, keep_values, selected
from kernels.paged_attention.tpu.call import Call
from kernels.paged_attention.tpu.geometry import MASKED, UNSEEN, Geometry
from kernels.paged_attention.tpu.integers import quotient, quotient_up, remainder, rounded_down
from kernels.paged_attention.tpu.layout import LANES
from kernels.paged_attention.tpu.operands import (
    capped,
    contract_keys,
    contract_values,
    finished,
    lane_tiles,
    softmax_update,
)


def attend_decodes(call: Call, first: Any, stop: Any) -> None:
    """Attend the decodes [first, stop), of one block; what groups have read for them is in the state."""

    @pl.when(first < stop)
    def _():
        _move_inputs(call, first, 0, lambda x: x.start())
        _tokens(call, first).move(0, 0, lambda x: x.start())
        jax.lax.fori_loop(first, stop, lambda i, turn: _attend_one(call, i, first, stop, turn), jnp.int32(0))
        for back in (2, 1):

            @pl.when(stop - back >= first)
            def _(back=back):
                parity = (stop - back - first) & 1
                _out_copy(call, stop - back, parity).wait()
                _write_copy(call, stop - back, parity).wait()


def _attend_one(call: Call, index: Any, first: Any, stop: Any, turn: Any) -> Any:
    """Attend one decode; `turn` counts blocks of keys, and so tells which buffer the next one is in."""
    plan, scratch, shape = call.plan, call.scratch, call.shape
    parity = (index - first) & 1
    is_reused = index - first >= 2
    pl.when(index + 1 < stop)(lambda: _move_inputs(call, index + 1, 1 - parity, lambda x: x.start()))
    _move_inputs(call, index, parity, lambda x: x.wait())
    begin, length = plan.decode_begin[index], plan.decode_len[index]
    num_blocks = quotient_up(length - begin, shape.block)
    _start(call, index)

    def one(number: Any, carry: None) -> None:
        buffer = (turn + number) & 1
        is_last = number + 1 == num_blocks
        following = jnp.where(is_last, index + 1, index)

        @pl.when(following < stop)
        def _():
            number_there = jnp.where(is_last, 0, number + 1)
            _tokens(call, following).move(number_there, 1 - buffer, lambda x: x.start())

        _tokens(call, index).move(number, buffer, lambda x: x.wait())
        position = begin + number * shape.block
        pl.when(is_last)(lambda: _insert(call, index, is_reused, parity, buffer, position))
        seen = (plan.decode_first[index] - position, length - position)
        for bundle in range(shape.bundles):
            _add_block(call, buffer, bundle, parity, seen)

    jax.lax.fori_loop(0, num_blocks, one, None)
    pl.when(is_reused)(lambda: _out_copy(call, index, parity).wait())
    for bundle in range(shape.bundles):
        state = (ref[bundle] for ref in (scratch.decode_sum, scratch.decode_acc))
        scratch.decode_out[parity, bundle] = finished(*state).astype(scratch.decode_out.dtype)
    _out_copy(call, index, parity).start()
    return turn + num_blocks


def _tokens(call: Call, index: Any) -> PagedTokens:
    plan = call.plan
    return PagedTokens(call, plan.decode_slot[index], plan.decode_begin[index], plan.decode_len[index])


def _move_inputs(call: Call, index: Any, parity: Any, act: Any) -> None:
    arrays, scratch = call.arrays, call.scratch
    ready = scratch.inputs_ready.at[parity]
    act(pltpu.make_async_copy(arrays.decode_queries.at[index], scratch.decode_queries.at[parity], ready))
    act(pltpu.make_async_copy(arrays.decode_rows.at[index], scratch.decode_rows.at[parity], ready))


def _out_copy(call: Call, index: Any, parity: Any) -> Any:
    source, target = call.scratch.decode_out.at[parity], call.results.decodes.at[index]
    return pltpu.make_async_copy(source, target, call.scratch.out_done.at[parity])


def _write_copy(call: Call, index: Any, parity: Any) -> Any:
    """The tile with the new token, on its way to its page."""
    shape, plan = call.shape, call.plan
    tile, size = shape.layout.sublanes, shape.layout.page_size
    position = plan.decode_len[index] - 1
    page = plan.page_table[plan.decode_slot[index] * shape.table_width + quotient(position, size)]
    row = pl.multiple_of(rounded_down(remainder(position, size), tile), tile)
    target = call.results.pages.at[page, :, pl.ds(row, tile), :]
    return pltpu.make_async_copy(call.scratch.written.at[parity], target, call.scratch.write_done.at[parity])


def _insert(call: Call, index: Any, is_reused: Any, parity: Any, buffer: Any, position: Any) -> None:
    """Put the new token where it belongs in the block that begins at `position`, and send it to its page."""
    shape, plan, scratch = call.shape, call.plan, call.scratch
    tile, width = shape.layout.sublanes, shape.layout.row_width
    offset = plan.decode_len[index] - 1 - position
    rows = pl.ds(pl.multiple_of(rounded_down(offset, tile), tile), tile)
    is_new = jax.lax.broadcasted_iota(jnp.int32, (tile, width), 0) == remainder(offset, tile)
    pl.when(is_reused)(lambda: _write_copy(call, index, parity).wait())
    for head in range(shape.num_kv_heads):
        new = jnp.broadcast_to(scratch.decode_rows[parity, head : head + 1, :], (tile, width))
        merged = selected(is_new, new, scratch.kv[buffer, head, rows, :])
        scratch.kv[buffer, head, rows, :] = merged
        scratch.written[parity, head] = merged
    _write_copy(call, index, parity).start()
    keep_values(call, buffer, 0, offset + 1)


def _start(call: Call, index: Any) -> None:
    """Take up the state that groups left for a decode, or that of nothing seen."""
    shape, scratch, sinks = call.shape, call.scratch, call.arrays.decode_start
    is_shared = call.plan.decode_shared[index] > 0

    @pl.when(is_shared)
    def _():
        member = remainder(index, shape.tiles.decodes)
        for bundle in range(shape.bundles):
            scratch.decode_max[bundle] = _member_rows(shape, scratch.state_max, bundle, member)
            scratch.decode_sum[bundle] = _member_rows(shape, scratch.state_sum, bundle, member)
            scratch.decode_acc[bundle] = _member_rows(shape, scratch.state_out, bundle, member)

    @pl.when(~is_shared)
    def _():
        scratch.decode_acc[...] = jnp.zeros(scratch.decode_acc.shape, jnp.float32)
        if sinks is None:
            scratch.decode_max[...] = jnp.full(scratch.decode_max.shape, UNSEEN, jnp.float32)
            scratch.decode_sum[...] = jnp.zeros(scratch.decode_sum.shape, jnp.float32)
        else:
            scratch.decode_max[...] = sinks[0]
            scratch.decode_sum[...] = sinks[1]


def _member_rows(shape: Geometry, ref: Any, bundle: int, member: Any) -> jax.Array:
    """The rows of one decode in a bundle, from a state that is ordered by KV head and decode."""
    rows, count = shape.head_rows, shape.heads_per_bundle
    if count == 1:
        return ref[bundle, pl.ds(pl.multiple_of(member * rows, 8), rows), :]
    # The 8 sublanes that hold the decode's rows are turned until these lie in their place.
    first = rounded_down(member * rows, 8)
    row = jax.lax.broadcasted_iota(jnp.int32, (8, ref.shape[-1]), 0)
    result = jnp.zeros(row.shape, jnp.float32)
    for place in range(count):
        head = bundle * count + place
        if head < shape.num_kv_heads:
            held = ref[head, pl.ds(pl.multiple_of(first, 8), 8), :]
            turned = pltpu.roll(held, (place * rows + first - member * rows) & 7, 0)
            result = jnp.where(quotient(row, rows) == place, turned, result)
    return result


def _add_block(call: Call, buffer: Any, bundle: int, parity: Any, seen: tuple[Any, Any]) -> None:
    """Take in the keys [seen[0], seen[1]) of a block, for all KV heads of a bundle."""
    shape, scratch = call.shape, call.scratch
    count = shape.heads_per_bundle
    heads = range(bundle * count, min(bundle * count + count, shape.num_kv_heads))
    queries = scratch.decode_queries[parity, bundle]
    parts = [lane_tiles(contract_keys(call, buffer, head, queries)) for head in heads]
    logits = [
        _visible(shape, capped(shape.options, part), index * LANES, seen)
        for index, part in enumerate(_own_rows(shape, parts))
    ]
    scratch.decode_max[bundle], decay, scratch.decode_sum[bundle], weights = softmax_update(
        scratch.decode_max[bundle], scratch.decode_sum[bundle], logits, shape.exponent
    )
    parts = [lane_tiles(contract_values(call, buffer, head, weights)) for head in heads]
    for index, part in enumerate(_own_rows(shape, parts)):
        lanes = slice(index * LANES, (index + 1) * LANES)
        scratch.decode_acc[bundle, :, lanes] = scratch.decode_acc[bundle, :, lanes] * decay + part


def _own_rows(shape: Geometry, parts: list[list[jax.Array]]) -> list[jax.Array]:
    """Of each KV head's product with a whole bundle (vectors of 128 lanes) the rows of its own queries."""
    row_head = jax.lax.broadcasted_iota(jnp.int32, (shape.bundle_rows, LANES), 0)
    row_head = quotient(row_head, shape.head_rows)
    result = parts[0]
    for place, part in enumerate(parts[1:], 1):
        result = [jnp.where(row_head == place, a, b) for a, b in zip(part, result, strict=True)]
    return result


def _visible(shape: Geometry, logits: jax.Array, offset: int, seen: tuple[Any, Any]) -> jax.Array:
    position = offset + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_seen = position < seen[1]
    if shape.options.is_bounded:
        is_seen &= position >= seen[0]
    return jnp.where(is_seen, logits, MASKED)
