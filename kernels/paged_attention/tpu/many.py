"""Passes of many queries over the same keys: a prefill chunk's, or those of the decodes of a prefix group.

The running softmax of all rows is kept in scratch memory. One turn of the inner loop is one KV head of one
block of keys, and where every row sees every key of it nothing is masked. Chunks and groups go through the
same code, so that there is one loop to compile and to tune.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.blocks import PagedTokens, keep_values
from kernels.paged_attention.tpu.call import Call
from kernels.paged_attention.tpu.geometry import MASKED, UNSEEN
from kernels.paged_attention.tpu.integers import quotient, quotient_up, rounded_down
from kernels.paged_attention.tpu.layout import LANES
from kernels.paged_attention.tpu.new_tokens import NewTokens
from kernels.paged_attention.tpu.operands import (
    capped,
    contract_keys,
    contract_values,
    finished,
    lane_tiles,
    softmax_update,
)

# Above any position: what a row sees that is limited by its keys only.
_ANY = 2**30


class Keys(NamedTuple):
    """The keys of one pass, all i32[]: some in the pages of a sequence, then some of the step's own."""

    slot: Any
    old_base: Any  # position where reading begins, a page's beginning
    old_begin: Any  # the first position that counts
    old_end: Any
    new_token: Any  # token of the step where reading begins, a multiple of the page size
    new_base: Any  # its position
    new_begin: Any
    new_end: Any
    free_begin: Any  # positions [free_begin, free_end) are seen by every row
    free_end: Any

    @classmethod
    def none(cls) -> Keys:
        return cls(*(jnp.int32(0) for _ in cls._fields))


def load_members(call: Call, block: Any) -> None:
    """Make the decodes of a block the rows, with nothing seen."""
    shape, arrays, scratch = call.shape, call.arrays, call.scratch
    window = pl.ds(pl.multiple_of(block * shape.member_rows, 16), shape.member_rows)
    rows = pl.ds(0, shape.member_rows)
    copy_now(call, arrays.member_queries.at[:, window, :], scratch.queries.at[:, rows, :])
    if arrays.member_first is not None:
        copy_now(call, arrays.member_first.at[window, :], scratch.row_first.at[rows, :])
    _reset(call, arrays.member_start)


def load_queries(call: Call, block: Any) -> None:
    """Make a block of the step's queries the rows, with nothing seen."""
    shape = call.shape
    window = pl.ds(pl.multiple_of(block * shape.query_rows, 16), shape.query_rows)
    target = call.scratch.queries.at[:, pl.ds(0, shape.query_rows), :]
    copy_now(call, call.arrays.queries.at[:, window, :], target)
    _reset(call, call.arrays.query_start)


def store_queries(call: Call, block: Any) -> None:
    """The results of a block of queries, whatever in the rows of decodes among them."""
    shape, scratch = call.shape, call.scratch
    rows = slice(0, shape.query_rows)
    window = pl.ds(pl.multiple_of(block * shape.query_rows, 16), shape.query_rows)

    def finish(head: Any, carry: None) -> None:
        state = (ref[head, rows, :] for ref in (scratch.state_sum, scratch.state_out))
        scratch.out[head] = finished(*state).astype(scratch.out.dtype)

    jax.lax.fori_loop(0, shape.num_kv_heads, finish, None)
    copy_now(call, scratch.out, call.results.queries.at[:, window, :])


def _members(call: Call, group: Any, block: Any) -> tuple[Any, Any, Any, Any]:
    """The decodes of a block, and those of them in a group: first, last, start, stop."""
    shape, plan = call.shape, call.plan
    first = block * shape.tiles.decodes
    last = jnp.minimum(first + shape.tiles.decodes, plan.num_decodes[0])
    return first, last, jnp.maximum(plan.group_start[group], first), jnp.minimum(plan.group_stop[group], last)


def is_in_group(call: Call, group: Any, block: Any) -> Any:
    """Some decodes of a block are in a group."""
    _, _, start, stop = _members(call, group, block)
    return (start < stop) & (call.plan.group_begin[group] < call.plan.group_end[group])


def is_chunk(call: Call, slot: Any) -> Any:
    """A slot has several queries."""
    return call.plan.query_start[slot + 1] - call.plan.query_start[slot] > 1


def group_keys(call: Call, group: Any, block: Any) -> Keys:
    """What a group's decodes in a block have in common. Sets which rows see it."""
    shape, plan = call.shape, call.plan
    first, last, start, stop = _members(call, group, block)
    begin, end = plan.group_begin[group], plan.group_end[group]
    lowest = highest = begin
    if shape.options.is_bounded:

        def widen(index: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
            visible = plan.decode_first[index]
            return jnp.minimum(bounds[0], visible), jnp.maximum(bounds[1], visible)

        lowest, highest = jax.lax.fori_loop(start, stop, widen, (end, begin))
        lowest = rounded_down(jnp.maximum(lowest, begin), shape.layout.page_size)
    rows = shape.state_rows
    member = first + quotient(jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0), shape.head_rows)
    call.scratch.row_last[...] = jnp.where((member >= start) & (member < stop), _ANY, -1)
    is_whole = (start == first) & (stop == last)  # rows past the last decode may see anything
    return Keys.none()._replace(
        slot=plan.decode_slot[start],
        old_base=lowest,
        old_begin=begin,
        old_end=end,
        free_begin=highest,
        free_end=jnp.where(is_whole, end, 0),
    )


def slot_keys(call: Call, slot: Any, block: Any) -> Keys:
    """What the queries of one sequence in a block see. Sets which rows are its, and what each sees."""
    shape, plan, scratch = call.shape, call.plan, call.scratch
    size, options = shape.layout.page_size, shape.options
    first = block * shape.tiles.queries
    last = first + shape.tiles.queries
    start, stop = plan.query_start[slot], plan.query_start[slot + 1]
    held = plan.kv_len[slot] - (stop - start)  # tokens from before this step
    rows = shape.state_rows
    token = first + quotient(jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0), shape.ratio)
    position = held + token - start
    scratch.row_last[...] = jnp.where((token >= start) & (token < stop), position, -1)
    if shape.options.is_bounded:
        scratch.row_first[...] = options.first_visible(position)
    lowest, end = held + jnp.maximum(first, start) - start, held + jnp.minimum(last, stop) - start
    begin = options.first_visible(lowest)
    new_token = rounded_down(start + jnp.maximum(begin - held, 0), size)
    return Keys(
        slot=slot,
        old_base=rounded_down(begin, size),
        old_begin=begin,
        old_end=held,
        new_token=new_token,
        new_base=held + new_token - start,
        new_begin=jnp.maximum(begin, held),
        new_end=end,
        free_begin=options.first_visible(end - 1),
        free_end=jnp.where((start <= first) & (last <= stop), lowest + 1, 0),
    )


def pass_over(call: Call, keys: Keys) -> None:
    """Let all rows take in the keys of a pass, a block at a time, the next one on its way."""
    shape = call.shape
    num_old = quotient_up(jnp.maximum(keys.old_end - keys.old_base, 0), shape.block)
    num_blocks = num_old + quotient_up(jnp.maximum(keys.new_end - keys.new_base, 0), shape.block)
    old = PagedTokens(call, keys.slot, keys.old_base, keys.old_end)
    new = NewTokens(call, keys.new_token)

    def move(number: Any, buffer: Any, act: Any) -> None:
        pl.when(number < num_old)(lambda: old.move(number, buffer, act))
        pl.when(number >= num_old)(lambda: new.move(number - num_old, buffer, act))

    def one(number: Any, carry: None) -> None:
        buffer = number & 1
        pl.when(number + 1 < num_blocks)(lambda: move(number + 1, 1 - buffer, lambda x: x.start()))
        move(number, buffer, lambda x: x.wait())
        is_old = number < num_old
        base = jnp.where(
            is_old, keys.old_base + number * shape.block, keys.new_base + (number - num_old) * shape.block
        )
        begin = jnp.maximum(jnp.where(is_old, keys.old_begin, keys.new_begin), base)
        end = jnp.minimum(jnp.where(is_old, keys.old_end, keys.new_end), base + shape.block)
        keep_values(call, buffer, begin - base, end - base)
        is_whole = (begin == base) & (end == base + shape.block)
        is_free = is_whole & (base >= keys.free_begin) & (end <= keys.free_end)
        pl.when(is_free)(lambda: _each_head(call, buffer, None))
        pl.when(~is_free)(lambda: _each_head(call, buffer, (base, begin, end)))

    @pl.when(num_blocks > 0)
    def _():
        move(0, 0, lambda x: x.start())
        jax.lax.fori_loop(0, num_blocks, one, None)


def _each_head(call: Call, buffer: Any, seen: tuple[Any, Any, Any] | None) -> None:
    jax.lax.fori_loop(
        0, call.shape.num_kv_heads, lambda head, carry: _add_block(call, buffer, head, seen), None
    )


def _add_block(call: Call, buffer: Any, head: Any, seen: tuple[Any, Any, Any] | None) -> None:
    """Take in one block of keys of one KV head. `seen` is None where every row sees all of it."""
    shape, scratch = call.shape, call.scratch
    logits = lane_tiles(contract_keys(call, buffer, head, scratch.queries[head]))
    logits = [capped(shape.options, part) for part in logits]
    if seen is not None:
        logits = [_masked(call, part, index * LANES, seen) for index, part in enumerate(logits)]
    scratch.state_max[head], decay, scratch.state_sum[head], weights = softmax_update(
        scratch.state_max[head], scratch.state_sum[head], logits, shape.exponent
    )
    gained = contract_values(call, buffer, head, weights)
    for index, part in enumerate(lane_tiles(gained)):
        lanes = slice(index * LANES, (index + 1) * LANES)
        scratch.state_out[head, :, lanes] = scratch.state_out[head, :, lanes] * decay + part


def _masked(call: Call, logits: jax.Array, offset: int, seen: tuple[Any, Any, Any]) -> jax.Array:
    base, begin, end = seen
    position = base + offset + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_seen = (position >= begin) & (position < end) & (position <= call.scratch.row_last[...])
    if call.shape.options.is_bounded:
        is_seen &= position >= call.scratch.row_first[...]
    return jnp.where(is_seen, logits, MASKED)


def _reset(call: Call, start: Any) -> None:
    """Nothing seen; a sink counts as one key seen whose value is zero."""
    scratch = call.scratch
    if start is not None:
        rows = pl.ds(0, start.shape[2])
        copy_now(call, start.at[0], scratch.state_max.at[:, rows, :])
        copy_now(call, start.at[1], scratch.state_sum.at[:, rows, :])

    def one(head: Any, carry: None) -> None:
        if start is None:
            scratch.state_max[head] = jnp.full(scratch.state_max.shape[1:], UNSEEN, jnp.float32)
            scratch.state_sum[head] = jnp.zeros(scratch.state_sum.shape[1:], jnp.float32)
        scratch.state_out[head] = jnp.zeros(scratch.state_out.shape[1:], jnp.float32)

    jax.lax.fori_loop(0, call.shape.num_kv_heads, one, None)


def copy_now(call: Call, source: Any, target: Any) -> None:
    copy = pltpu.make_async_copy(source, target, call.scratch.done.at[0])
    copy.start()
    copy.wait()
