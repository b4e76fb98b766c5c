"""Rows with one query: each reads the pages that no group has read for it, writes its new token, and attends.

All KV heads of a block are computed in one turn of the loop. Their keys and values pass through the matrix
unit as its stationary operand; the few queries of a KV head are the moving one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.blocks import PagedTokens, keep_values, selected
from kernels.paged_attention.tpu.call import Call
from kernels.paged_attention.tpu.geometry import MASKED, UNSEEN, Geometry
from kernels.paged_attention.tpu.layout import LANES
from kernels.paged_attention.tpu.operands import capped, contract_keys, contract_values, lane_tiles


class Softmax(NamedTuple):
    """The running softmax of one bundle of queries."""

    maximum: jax.Array  # f32[bundle rows, 128], the same in all lanes
    total: jax.Array  # f32[bundle rows, 128], to be added up over lanes
    output: jax.Array  # f32[bundle rows, Q]


def attend_decodes(call: Call, first: Any, stop: Any) -> None:
    """Attend the decodes [first, stop), of one block; what groups have read for them is in the state."""
    plan, scratch, shape = call.plan, call.scratch, call.shape

    def tokens(index: Any) -> PagedTokens:
        return PagedTokens(call, plan.decode_slot[index], plan.decode_begin[index], plan.decode_len[index])

    def one(index: Any, turn: Any) -> Any:
        parity = (index - first) % 2
        pl.when(index + 1 < stop)(lambda: _each_input(call, index + 1, 1 - parity, lambda x: x.start()))
        _each_input(call, index, parity, lambda x: x.wait())
        begin, length = plan.decode_begin[index], plan.decode_len[index]
        num_blocks = pl.cdiv(length - begin, shape.block)
        queries = [scratch.decode_queries[parity, bundle] for bundle in range(shape.bundles)]

        def block(number: Any, carry: tuple[Any, list[Softmax]]) -> tuple[Any, list[Softmax]]:
            turn, states = carry
            buffer = turn % 2
            is_last = number + 1 == num_blocks
            next_index = jnp.where(is_last, index + 1, index)

            @pl.when(next_index < stop)
            def _():
                tokens(next_index).start(jnp.where(is_last, 0, number + 1), 1 - buffer)

            tokens(index).wait(number, buffer)
            position = begin + number * shape.block
            pl.when(is_last)(lambda: _insert(call, index, index - first >= 2, parity, buffer, position))
            seen = (plan.decode_first[index] - position, length - position)
            states = [
                _add_block(call, buffer, bundle, query, seen, state)
                for bundle, (query, state) in enumerate(zip(queries, states, strict=True))
            ]
            return turn + 1, states

        turn, states = jax.lax.fori_loop(0, num_blocks, block, (turn, _start(call, index)))
        pl.when(index - first >= 2)(lambda: _out_copy(call, index, parity).wait())
        for bundle, state in enumerate(states):
            scratch.decode_out[parity, bundle] = finished(*state).astype(scratch.decode_out.dtype)
        _out_copy(call, index, parity).start()
        return turn

    @pl.when(first < stop)
    def _():
        _each_input(call, first, 0, lambda x: x.start())
        tokens(first).start(0, 0)
        jax.lax.fori_loop(first, stop, one, jnp.int32(0))
        for back in (2, 1):

            @pl.when(stop - back >= first)
            def _(back=back):
                parity = (stop - back - first) % 2
                _out_copy(call, stop - back, parity).wait()
                _write_copy(call, stop - back, parity).wait()


def _each_input(call: Call, index: Any, parity: Any, act: Any) -> None:
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
    page = plan.page_table[plan.decode_slot[index] * shape.table_width + position // size]
    row = pl.multiple_of(position % size // tile * tile, tile)
    target = call.results.pages.at[page, :, pl.ds(row, tile), :]
    return pltpu.make_async_copy(call.scratch.written.at[parity], target, call.scratch.write_done.at[parity])


def _insert(call: Call, index: Any, is_pending: Any, parity: Any, buffer: Any, position: Any) -> None:
    """Put the new token where it belongs in the block that begins at `position`, and send it to its page."""
    shape, plan, scratch = call.shape, call.plan, call.scratch
    tile, width = shape.layout.sublanes, shape.layout.row_width
    offset = plan.decode_len[index] - 1 - position
    rows = pl.ds(pl.multiple_of(offset // tile * tile, tile), tile)
    row = jax.lax.broadcasted_iota(jnp.int32, (tile, width), 0)
    pl.when(is_pending)(lambda: _write_copy(call, index, parity).wait())
    for head in range(shape.num_kv_heads):
        new = jnp.broadcast_to(scratch.decode_rows[parity, head : head + 1, :], (tile, width))
        merged = selected(row == offset % tile, new, scratch.kv[buffer, head, rows, :])
        scratch.kv[buffer, head, rows, :] = merged
        scratch.written[parity, head] = merged
    _write_copy(call, index, parity).start()
    keep_values(call, buffer, 0, offset + 1)


def _start(call: Call, index: Any) -> list[Softmax]:
    """The state that groups left for a decode, or that of nothing seen."""
    shape, scratch = call.shape, call.scratch
    is_shared = call.plan.decode_shared[index] > 0
    member = index % shape.tiles.decodes
    states = []
    for bundle in range(shape.bundles):
        rows, operand = shape.bundle_rows, shape.layout.operand_width
        maximum = jnp.full((rows, LANES), UNSEEN, jnp.float32)
        total = jnp.zeros((rows, LANES), jnp.float32)
        if call.arrays.decode_start is not None:
            maximum, total = call.arrays.decode_start[0, bundle], call.arrays.decode_start[1, bundle]
        fresh = Softmax(maximum, total, jnp.zeros((rows, operand), jnp.float32))
        refs = (scratch.state_max, scratch.state_sum, scratch.state_out)
        left = [_member_rows(shape, ref, bundle, member) for ref in refs]
        states.append(Softmax(*(jnp.where(is_shared, a, b) for a, b in zip(left, fresh, strict=True))))
    return states


def _member_rows(shape: Geometry, ref: Any, bundle: int, member: Any) -> jax.Array:
    """The rows of one decode in a bundle, from a state that is ordered by KV head and decode."""
    rows, count = shape.head_rows, shape.heads_per_bundle
    if count == 1:
        return ref[bundle, pl.ds(pl.multiple_of(member * rows, 8), rows), :]
    # A bundle's whole sublanes are read from where the decode's own rows come to lie in their place.
    row = jax.lax.broadcasted_iota(jnp.int32, (8, ref.shape[-1]), 0)
    result = jnp.zeros(row.shape, jnp.float32)
    for place in range(count):
        head = bundle * count + place
        if head < shape.num_kv_heads:
            aligned = member * rows // 8 * 8
            held = ref[head, pl.ds(pl.multiple_of(aligned, 8), 8), :]
            turned = pltpu.roll(held, (place * rows - member * rows + aligned) % 8, 0)
            result = jnp.where(row // rows == place, turned, result)
    return result


def _add_block(
    call: Call, buffer: Any, bundle: int, queries: jax.Array, seen: tuple[Any, Any], state: Softmax
) -> Softmax:
    """Take in the keys [seen[0], seen[1]) of a block, for all KV heads of a bundle."""
    shape = call.shape
    count = shape.heads_per_bundle
    heads = [h for h in range(bundle * count, bundle * count + count) if h < shape.num_kv_heads]
    row_head = jax.lax.broadcasted_iota(jnp.int32, (shape.bundle_rows, LANES), 0) // shape.head_rows

    def own(parts: list[list[jax.Array]]) -> list[jax.Array]:
        """Of each KV head's result, vectors of 128 lanes, the rows of its own queries."""
        result = parts[0]
        for place, part in enumerate(parts[1:], 1):
            result = [jnp.where(row_head == place, a, b) for a, b in zip(part, result, strict=True)]
        return result

    logits = own([lane_tiles(contract_keys(call, buffer, head, queries)) for head in heads])
    lane = jax.lax.broadcasted_iota(jnp.int32, (shape.bundle_rows, LANES), 1)
    masked = []
    for index, part in enumerate(logits):
        position = lane + index * LANES
        is_seen = position < seen[1]
        if shape.is_bounded:
            is_seen &= position >= seen[0]
        masked.append(jnp.where(is_seen, capped(shape.options, part), MASKED))
    highest = masked[0]
    for part in masked[1:]:
        highest = jnp.maximum(highest, part)
    highest = jnp.max(highest, axis=1, keepdims=True)
    maximum = jnp.maximum(state.maximum, highest)
    decay = jnp.exp2((state.maximum - maximum) * shape.exponent)
    weights = [jnp.exp2((part - maximum) * shape.exponent) for part in masked]
    total = state.total * decay
    for part in weights:
        total = total + part
    stacked = jnp.concatenate(weights, axis=1)
    gained = own([lane_tiles(contract_values(call, buffer, head, stacked)) for head in heads])
    output = [a * decay + b for a, b in zip(lane_tiles(state.output), gained, strict=True)]
    return Softmax(maximum, total, jnp.concatenate(output, axis=1))


def finished(maximum: jax.Array, total: jax.Array, output: jax.Array) -> jax.Array:
    """f32[rows, Q]: the weighted mean; zero where nothing was seen."""
    total = jnp.sum(total, axis=1, keepdims=True)
    return output * jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
