"""Passes of many queries over the same keys: a prefill chunk's, or those of the decodes of a prefix group.

The running softmax of all rows is kept in scratch memory. One turn of the inner loop is one KV head of one
block of keys, and where every row sees every key of it nothing is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.blocks import PagedTokens, keep_values
from kernels.paged_attention.tpu.call import Call
from kernels.paged_attention.tpu.decode import finished
from kernels.paged_attention.tpu.geometry import MASKED, UNSEEN
from kernels.paged_attention.tpu.layout import LANES
from kernels.paged_attention.tpu.new_tokens import NewTokens
from kernels.paged_attention.tpu.operands import capped, contract_keys, contract_values, lane_tiles

# Above any position: what a row sees that is limited by its keys only.
_ANY = 2**30


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys that a pass goes over, and what all rows of it see of them.

    tokens: where they are read from; block 0 begins at position `base`.
    begin, end: the positions that count.
    free_begin, free_end: positions that every row sees.
    """

    tokens: PagedTokens | NewTokens
    base: Any
    begin: Any
    end: Any
    free_begin: Any
    free_end: Any


def attend_queries(call: Call, block: Any) -> None:
    """Attend a block of the step's queries, sequence by sequence; those of decodes are passed over."""
    shape, plan, scratch = call.shape, call.plan, call.scratch
    rows = shape.query_rows
    window = pl.ds(pl.multiple_of(block * rows, 16), rows)
    target = scratch.queries.at[:, pl.ds(0, rows), :]
    _sync(call, call.arrays.queries.at[:, window, :], target)
    _reset(call, rows, call.arrays.query_start)
    first_token = block * shape.tiles.queries

    def one(slot: Any, carry: None) -> None:
        start, stop = plan.query_start[slot], plan.query_start[slot + 1]
        pl.when(stop - start > 1)(lambda: _attend_slot(call, slot, start, stop, first_token))

    jax.lax.fori_loop(plan.first_slot[block], plan.last_slot[block] + 1, one, None)

    def finish(head: Any, carry: None) -> None:
        state = (ref[head, :rows, :] for ref in (scratch.state_max, scratch.state_sum, scratch.state_out))
        scratch.out[head] = finished(*state).astype(scratch.out.dtype)

    jax.lax.fori_loop(0, shape.num_kv_heads, finish, None)
    _sync(call, scratch.out, call.results.queries.at[:, window, :])


def attend_groups(call: Call, block: Any) -> None:
    """Read the pages of groups for the decodes of a block; the state stays in scratch memory."""
    shape, plan, scratch = call.shape, call.plan, call.scratch
    rows = shape.member_rows
    window = pl.ds(pl.multiple_of(block * rows, 16), rows)
    first = block * shape.tiles.decodes
    last = jnp.minimum(first + shape.tiles.decodes, plan.num_decodes[0])

    @pl.when(plan.block_shared[block] > 0)
    def _():
        _sync(call, call.arrays.member_queries.at[:, window, :], scratch.queries.at[:, pl.ds(0, rows), :])
        _reset(call, rows, call.arrays.member_start)
        if call.arrays.member_first is not None:
            _sync(call, call.arrays.member_first.at[window, :], scratch.row_first.at[pl.ds(0, rows), :])

        def one(group: Any, carry: None) -> None:
            start = jnp.maximum(plan.group_start[group], first)
            stop = jnp.minimum(plan.group_stop[group], last)
            _attend_group(call, group, start, stop, first, last)

        jax.lax.fori_loop(0, shape.num_groups, one, None)


def _attend_group(call: Call, group: Any, start: Any, stop: Any, first: Any, last: Any) -> None:
    shape, plan, rows = call.shape, call.plan, call.shape.member_rows
    size = shape.layout.page_size
    begin, end = plan.group_begin[group], plan.group_end[group]

    @pl.when((start < stop) & (begin < end))
    def _():
        free_begin = begin
        lowest = begin
        if shape.is_bounded:
            visible = [plan.decode_first[start], plan.decode_first[start]]
            lowest, free_begin = jax.lax.fori_loop(
                start,
                stop,
                lambda i, x: (
                    jnp.minimum(x[0], plan.decode_first[i]),
                    jnp.maximum(x[1], plan.decode_first[i]),
                ),
                tuple(visible),
            )
            lowest = jnp.maximum(begin, lowest // size * size)
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
        member = first + row // shape.head_rows
        is_member = (member >= start) & (member < stop)
        call.scratch.row_last[:rows, :] = jnp.where(is_member, _ANY, -1)
        is_whole = (start == first) & (stop == last)
        tokens = PagedTokens(call, plan.decode_slot[start], lowest, end)
        keys = Keys(tokens, lowest, begin, end, free_begin, jnp.where(is_whole, end, 0))
        pl.when(lowest < end)(lambda: _pass_over(call, rows, keys))


def _attend_slot(call: Call, slot: Any, start: Any, stop: Any, first_token: Any) -> None:
    """The queries [start, stop) of one sequence that lie in the block which begins at `first_token`."""
    shape, plan, scratch = call.shape, call.plan, call.scratch
    rows, size = shape.query_rows, shape.layout.page_size
    last_token = first_token + shape.tiles.queries
    held = plan.kv_len[slot] - (stop - start)  # tokens from before this step
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
    token = first_token + row // shape.ratio
    is_own = (token >= start) & (token < stop)
    position = held + token - start
    scratch.row_last[:rows, :] = jnp.where(is_own, position, -1)
    lowest, highest = held + jnp.maximum(first_token, start) - start, held + jnp.minimum(last_token, stop) - start
    free_begin = shape.options.first_visible(highest - 1)
    begin = shape.options.first_visible(lowest)
    if shape.is_bounded:
        scratch.row_first[:rows, :] = shape.options.first_visible(position)
    # Padding behind the last token of the step may see anything.
    is_whole = (start <= first_token) & (last_token <= stop)
    free_end = jnp.where(is_whole, lowest + 1, 0)
    old = begin // size * size
    paged = PagedTokens(call, slot, old, held)
    keys = Keys(paged, old, begin, held, free_begin, jnp.minimum(free_end, held))
    pl.when(begin < held)(lambda: _pass_over(call, rows, keys))
    new_begin = (start + jnp.maximum(begin - held, 0)) // size * size
    new = NewTokens(call, new_begin, start + highest - held)
    base = held + new_begin - start
    _pass_over(call, rows, Keys(new, base, jnp.maximum(begin, held), highest, free_begin, free_end))


def _pass_over(call: Call, rows: int, keys: Keys) -> None:
    shape = call.shape
    num_blocks = pl.cdiv(keys.end - keys.base, shape.block)
    keys.tokens.start(0, 0)

    def one(number: Any, carry: None) -> None:
        buffer = number % 2
        pl.when(number + 1 < num_blocks)(lambda: keys.tokens.start(number + 1, 1 - buffer))
        keys.tokens.wait(number, buffer)
        base = keys.base + number * shape.block
        begin, end = jnp.maximum(keys.begin - base, 0), jnp.minimum(keys.end - base, shape.block)
        keep_values(call, buffer, begin, end)
        is_free = (base >= keys.free_begin) & (base >= keys.begin) & (base + shape.block <= keys.free_end)
        pl.when(is_free)(lambda: _each_head(call, rows, buffer, None))
        pl.when(~is_free)(lambda: _each_head(call, rows, buffer, (base, keys.begin, keys.end)))

    jax.lax.fori_loop(0, num_blocks, one, None)


def _each_head(call: Call, rows: int, buffer: Any, seen: tuple[Any, Any, Any] | None) -> None:
    def one(head: Any, carry: None) -> None:
        _add_block(call, rows, buffer, head, seen)

    jax.lax.fori_loop(0, call.shape.num_kv_heads, one, None)


def _add_block(call: Call, rows: int, buffer: Any, head: Any, seen: tuple[Any, Any, Any] | None) -> None:
    """Take in one block of keys of one KV head. `seen` is None where every row sees all of it."""
    shape, scratch = call.shape, call.scratch
    logits = lane_tiles(contract_keys(call, buffer, head, scratch.queries[head, :rows, :]))
    logits = [capped(shape.options, part) for part in logits]
    if seen is not None:
        logits = [_masked(call, rows, part, i * LANES, seen) for i, part in enumerate(logits)]
    highest = logits[0]
    for part in logits[1:]:
        highest = jnp.maximum(highest, part)
    before = scratch.state_max[head, :rows, :]
    maximum = jnp.maximum(before, jnp.max(highest, axis=1, keepdims=True))
    scratch.state_max[head, :rows, :] = maximum
    decay = jnp.exp2((before - maximum) * shape.exponent)
    weights = [jnp.exp2((part - maximum) * shape.exponent) for part in logits]
    total = scratch.state_sum[head, :rows, :] * decay
    for part in weights:
        total = total + part
    scratch.state_sum[head, :rows, :] = total
    gained = contract_values(call, buffer, head, jnp.concatenate(weights, axis=1))
    for index, part in enumerate(lane_tiles(gained)):
        lanes = slice(index * LANES, (index + 1) * LANES)
        scratch.state_out[head, :rows, lanes] = scratch.state_out[head, :rows, lanes] * decay + part


def _masked(call: Call, rows: int, logits: jax.Array, offset: int, seen: tuple[Any, Any, Any]) -> jax.Array:
    base, begin, end = seen
    position = base + offset + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    is_seen = (position >= begin) & (position < end) & (position <= call.scratch.row_last[:rows, :])
    if call.shape.is_bounded:
        is_seen &= position >= call.scratch.row_first[:rows, :]
    return jnp.where(is_seen, logits, MASKED)


def _reset(call: Call, rows: int, start: Any) -> None:
    """Nothing seen; a sink counts as one key seen whose value is zero."""
    scratch, heads = call.scratch, call.shape.num_kv_heads
    if start is not None:
        _sync(call, start.at[0], scratch.state_max.at[:, pl.ds(0, rows), :])
        _sync(call, start.at[1], scratch.state_sum.at[:, pl.ds(0, rows), :])

    def one(head: Any, carry: None) -> None:
        if start is None:
            scratch.state_max[head, :rows, :] = jnp.full((rows, LANES), UNSEEN, jnp.float32)
            scratch.state_sum[head, :rows, :] = jnp.zeros((rows, LANES), jnp.float32)
        scratch.state_out[head, :rows, :] = jnp.zeros((rows, scratch.state_out.shape[-1]), jnp.float32)

    jax.lax.fori_loop(0, heads, one, None)


def _sync(call: Call, source: Any, target: Any) -> None:
    copy = pltpu.make_async_copy(source, target, call.scratch.done.at[0])
    copy.start()
    copy.wait()
