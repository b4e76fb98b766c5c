"""The step's rows, arranged for the kernels by XLA. Nothing here depends on the layer but the page table."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.layout import Groups, Rows


class Plan(NamedTuple):
    """Who reads what. Decodes, the sequences with one query, are numbered `D` in the order of their slots."""

    query_start: jax.Array  # i32[S + 1]
    kv_len: jax.Array  # i32[S]
    page_table: jax.Array  # i32[S, max pages of a sequence]
    token_slot: jax.Array  # i32[T]; S for padding tokens
    token_position: jax.Array  # i32[T]
    chunk_slot: jax.Array  # i32[B], of each block of queries of a prefill chunk; S for blocks without any
    chunk_first: jax.Array  # i32[B], its first query's index in the chunk
    decode_slot: jax.Array  # i32[D]; S past the last decode
    own_begin: jax.Array  # i32[D], the first position that no group reads for this decode
    group_slot: jax.Array  # i32[G], a slot whose page table has the group's pages
    group_first: jax.Array  # i32[G], the group's decodes [group_first, group_last)
    group_last: jax.Array  # i32[G]
    group_begin: jax.Array  # i32[G], the positions [group_begin, group_end) that it shares
    group_end: jax.Array  # i32[G]
    num_groups: jax.Array  # i32[1], how many entries to look at


def make_plan(shape: Geometry, rows: Rows, groups: Groups) -> Plan:
    """The plan of a step."""
    query_len = rows.query_len
    decodes_until = jnp.cumsum(query_len == 1, dtype=jnp.int32)  # i32[S], up to and with each slot
    chunk_slot, chunk_first = _chunk_blocks(shape, query_len)
    index = jnp.arange(shape.num_decodes, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), decodes_until])
    first, last = before[groups.slot_start], before[groups.slot_stop]
    end = groups.page_stop * shape.layout.page_size
    inside = (index[:, None] >= first) & (index[:, None] < last)  # [D, G]
    entry = jnp.arange(1, shape.num_groups + 1, dtype=jnp.int32)
    return Plan(
        query_start=rows.query_start,
        kv_len=rows.kv_len,
        page_table=rows.page_table,
        token_slot=rows.token_slot(shape.num_tokens),
        token_position=rows.token_position(shape.num_tokens),
        chunk_slot=chunk_slot,
        chunk_first=chunk_first,
        decode_slot=jnp.sum(decodes_until <= index[:, None], axis=1, dtype=jnp.int32),
        own_begin=jnp.max(jnp.where(inside, end, 0), axis=1),
        group_slot=jnp.minimum(groups.slot_start, shape.num_slots - 1),
        group_first=first,
        group_last=last,
        group_begin=groups.page_start * shape.layout.page_size,
        group_end=end,
        num_groups=jnp.max(jnp.where(first < last, entry, 0), keepdims=True),
    )


def _chunk_blocks(shape: Geometry, query_len: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(slot, first query) of each block of queries, each i32[B]."""
    each = shape.chunk_queries
    blocks = jnp.where(query_len > 1, -(-query_len // each), 0)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    index = jnp.arange(shape.num_chunk_blocks, dtype=jnp.int32)
    slot = jnp.sum(ends <= index[:, None], axis=1, dtype=jnp.int32)
    inside = jnp.minimum(slot, shape.num_slots - 1)
    return slot, (index - (ends - blocks)[inside]) * each
