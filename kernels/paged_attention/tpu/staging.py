"""What XLA prepares for the kernel: the plan in scalar memory, and the tokens in the kernel's order."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.paged_attention.layout import Groups, Rows
from kernels.paged_attention.tpu.call import Arrays, Results, Scalars, padded
from kernels.paged_attention.tpu.geometry import UNSEEN, Geometry
from kernels.paged_attention.tpu.layout import LANES, TpuPages


def make_plan(shape: Geometry, rows: Rows, groups: Groups, num_cores: int) -> Scalars:
    """Which decodes there are, what they read, and each core's part of the work."""
    size = shape.layout.page_size
    single = rows.query_len == 1
    num_before = jnp.pad(jnp.cumsum(single, dtype=jnp.int32), (1, 0))
    slot = decode_slots(shape, rows)
    is_present = jnp.arange(shape.num_decodes) < num_before[-1]
    length = jnp.where(is_present, rows.kv_len[slot], 0)
    first = jnp.maximum(shape.options.first_visible(length - 1), 0)
    start, stop = num_before[groups.slot_start], num_before[groups.slot_stop]
    begin, end = groups.page_start * size, groups.page_stop * size
    decode = jnp.arange(shape.num_decodes, dtype=jnp.int32)[:, None]
    is_member = (decode >= start) & (decode < stop)
    shared = jnp.max(jnp.where(is_member, end, 0), axis=1)
    decode_begin = jnp.maximum(shared, first // size * size)
    first_slot, last_slot, query_cost = _query_blocks(shape, rows)
    decode_cost = (length - decode_begin).reshape(-1, shape.tiles.decodes).sum(1)
    write_cost = jnp.where(rows.query_len > 1, rows.query_len, 0)
    number = jnp.arange(1, shape.num_groups + 1, dtype=jnp.int32)
    return Scalars(
        page_table=rows.page_table.reshape(-1),
        query_start=rows.query_start,
        kv_len=rows.kv_len,
        num_decodes=num_before[-1:],
        decode_slot=slot,
        decode_len=length,
        decode_first=first,
        decode_begin=decode_begin,
        decode_shared=shared,
        block_shared=shared.reshape(-1, shape.tiles.decodes).max(1),
        num_groups=jnp.max(jnp.where((start < stop) & (begin < end), number, 0), keepdims=True),
        group_start=start,
        group_stop=stop,
        group_begin=begin,
        group_end=end,
        first_slot=first_slot,
        last_slot=last_slot,
        core_decodes=_split(decode_cost, num_cores),
        core_queries=_split(query_cost, num_cores),
        core_writes=_split(write_cost, num_cores),
    )


def decode_slots(shape: Geometry, rows: Rows) -> jax.Array:
    """i32[D]: the slots with one query, in order; then others."""
    slots = jnp.argsort(rows.query_len != 1, stable=True).astype(jnp.int32)
    return jnp.pad(slots, (0, max(0, shape.num_decodes - slots.shape[0])))[: shape.num_decodes]


def _query_blocks(shape: Geometry, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each block of tokens the first and last slot to look at (none: last < first), its cost."""
    each = shape.tiles.queries
    num_blocks = shape.num_tokens // each
    slot = rows.token_slot(shape.num_tokens)
    inside = jnp.minimum(slot, shape.num_slots - 1)
    is_chunk = (slot < shape.num_slots) & (rows.query_len[inside] > 1)
    cost = jnp.where(is_chunk, rows.token_position(shape.num_tokens) + 1, 0).reshape(num_blocks, each).sum(1)
    by_block = slot.reshape(num_blocks, each)
    first, last = by_block[:, 0], jnp.minimum(by_block[:, -1], shape.num_slots - 1)
    has_any = is_chunk.reshape(num_blocks, each).any(1)
    return jnp.where(has_any, first, 0), jnp.where(has_any, last, -1), cost


def _split(cost: jax.Array, num_parts: int) -> jax.Array:
    """i32[num_parts + 1]: contiguous parts of about equal cost."""
    done = jnp.cumsum(cost.astype(jnp.float32))
    share = done[-1] * jnp.arange(1, num_parts, dtype=jnp.float32) / num_parts
    inner = jnp.searchsorted(done, share).astype(jnp.int32)
    ends = jnp.array([0, cost.shape[0]], jnp.int32)
    return jnp.concatenate([ends[:1], inner, ends[1:]])


def make_arrays(
    shape: Geometry,
    q: jax.Array,
    new_rows: jax.Array,
    new_scales: jax.Array | None,
    pages: TpuPages,
    plan: Scalars,
    sinks: jax.Array | None,
) -> Arrays:
    """The step's q [T, N, H] and packed new rows [T, K, W], as the kernel takes them."""
    layout, heads, ratio = shape.layout, shape.num_kv_heads, shape.ratio
    operand = layout.operand_width
    pad = [(0, 0), (0, 0), (0, 0), (0, operand - layout.head_dim)]
    by_head = q.reshape(-1, heads, ratio, layout.head_dim).astype(shape.compute_dtype)
    by_head = jnp.pad(by_head, pad)
    token = plan.query_start[plan.decode_slot]
    decodes = by_head.at[token].get(mode="clip")
    decodes = jnp.pad(decodes, [(0, 0), (0, 0), (0, shape.head_rows - ratio), (0, 0)])
    queries = jnp.pad(by_head, [(0, shape.num_tokens - q.shape[0]), (0, 0), (0, 0), (0, 0)])
    member_first = None
    if shape.options.is_bounded:
        member_first = jnp.repeat(plan.decode_first, shape.head_rows)[:, None]
        member_first = jnp.broadcast_to(member_first, (member_first.shape[0], LANES))
    decode_rows = new_rows.at[token].get(mode="clip")
    extra = padded(heads, layout.sublanes) - heads
    starts = (None, None, None) if sinks is None else _starts(shape, sinks)
    size = layout.page_size
    behind = padded(q.shape[0] + 2 * size + shape.block, size) - q.shape[0] - size
    by_page = None
    if new_scales is not None:
        by_page = jnp.pad(new_scales, [(size, behind), (0, 0), (0, 0)])
        by_page = by_page.reshape(-1, size, 2, heads).transpose(0, 2, 3, 1)
    return Arrays(
        decode_queries=_bundled(shape, decodes),
        decode_rows=jnp.pad(decode_rows, [(0, 0), (0, extra), (0, 0)]),
        member_queries=decodes.transpose(1, 0, 2, 3).reshape(heads, -1, operand),
        queries=queries.transpose(1, 0, 2, 3).reshape(heads, -1, operand),
        new_rows=jnp.pad(new_rows.transpose(1, 0, 2), [(0, 0), (size, behind), (0, 0)]),
        new_scales=by_page,
        member_first=member_first,
        decode_start=starts[0],
        member_start=starts[1],
        query_start=starts[2],
        scales=pages.scales,
        pages=pages.rows,
    )


def _bundled(shape: Geometry, by_head: jax.Array) -> jax.Array:
    """[D, K, head rows, X] -> [D, bundles, bundle rows, X]."""
    extra = shape.bundles * shape.heads_per_bundle - shape.num_kv_heads
    by_head = jnp.pad(by_head, [(0, 0), (0, extra), (0, 0), (0, 0)])
    return by_head.reshape(-1, shape.bundles, shape.bundle_rows, by_head.shape[-1])


def _starts(shape: Geometry, sinks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Running maximum and sum of each path's rows with a sink seen: f32[2, ..., 128]."""
    unit = 1.0 if shape.options.soft_cap is not None else shape.options.scale
    maximum = jnp.broadcast_to(
        sinks.astype(jnp.float32).reshape(1, shape.num_kv_heads, -1, 1) / unit,
        (1, shape.num_kv_heads, shape.ratio, LANES),
    )
    total = (jnp.arange(LANES) == 0).astype(jnp.float32)  # one lane of those that are added up
    total = jnp.broadcast_to(total, maximum.shape)
    both = jnp.concatenate([maximum, total])  # [2, K, ratio, 128]
    full = jnp.pad(both, [(0, 0), (0, 0), (0, shape.head_rows - shape.ratio), (0, 0)], constant_values=UNSEEN)
    return (
        _bundled(shape, full),
        jnp.tile(full, (1, 1, shape.tiles.decodes, 1)),
        jnp.tile(both, (1, 1, shape.tiles.queries, 1)),
    )


def gather_results(shape: Geometry, q: jax.Array, rows: Rows, results: Results) -> jax.Array:
    """out [T, N, H]: each token's from where the kernel left it, zero for padding tokens."""
    layout, heads, ratio = shape.layout, shape.num_kv_heads, shape.ratio
    begin = layout.value_lane - layout.value_operand
    lanes = slice(begin, begin + layout.head_dim)
    decodes = results.decodes.reshape(shape.num_decodes, -1, shape.head_rows, layout.operand_width)
    decodes = decodes[:, :heads, :ratio, lanes]
    queries = results.queries.reshape(heads, -1, ratio, layout.operand_width)[:, : q.shape[0], :, lanes]
    slot = rows.token_slot(q.shape[0])
    inside = jnp.minimum(slot, shape.num_slots - 1)
    is_single = rows.query_len == 1
    number = jnp.cumsum(is_single, dtype=jnp.int32) - 1
    decodes = decodes.at[number[inside]].get(mode="clip")
    out = jnp.where(is_single[inside][:, None, None, None], decodes, queries.transpose(1, 0, 2, 3))
    out = jnp.where((slot < shape.num_slots)[:, None, None, None], out, 0)
    return out.reshape(q.shape).astype(q.dtype)
