"""What the parts of the kernel are handed: its references by name, and its scratch memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.geometry import Geometry
from kernels.paged_attention.tpu.layout import LANES


class Scalars(NamedTuple):
    """The step's plan, in scalar memory. `D` decodes (rows of one query), compact and in slot order."""

    page_table: Any  # i32[S * table width]
    query_start: Any  # i32[S + 1]
    kv_len: Any  # i32[S]
    num_decodes: Any  # i32[1]
    decode_slot: Any  # i32[D]
    decode_len: Any  # i32[D], tokens of the sequence, the new one included
    decode_first: Any  # i32[D], the first token that it sees
    decode_begin: Any  # i32[D], the first token that it reads by itself, at a page's beginning
    decode_shared: Any  # i32[D], tokens that groups read for it
    block_shared: Any  # i32[D / decodes of a block], the most of these in the block
    num_groups: Any  # i32[1], all later ones are empty
    group_start: Any  # i32[G], the first decode of a group
    group_stop: Any  # i32[G]
    group_begin: Any  # i32[G], the first token of its pages
    group_end: Any  # i32[G]
    first_slot: Any  # i32[query blocks], the slots with queries in a block
    last_slot: Any  # i32[query blocks]
    core_decodes: Any  # i32[cores + 1], each core's range of blocks of decodes
    core_queries: Any  # i32[cores + 1], of blocks of queries
    core_writes: Any  # i32[cores + 1], of slots whose new tokens it writes


class Arrays(NamedTuple):
    """In the chip's main memory."""

    decode_queries: Any  # [D, bundles, bundle rows, Q]
    decode_rows: Any  # [D, K padded to whole tiles, W], each decode's new key and value
    member_queries: Any  # [K, D * head rows, Q], the decodes' queries again, by KV head
    queries: Any  # [K, T * ratio, Q]
    new_rows: Any  # [K, T and more, W], the step's new keys and values
    new_scales: Any  # f32[T and more / page, 2, K, page], or None
    member_first: Any  # i32[D * head rows, 128], `decode_first` of each row, or None
    decode_start: Any  # f32[2, bundles, bundle rows, 128], running maximum and sum with sinks, or None
    member_start: Any  # f32[2, K, rows of a block of decodes, 128], or None
    query_start: Any  # f32[2, K, rows of a block of queries, 128], or None
    scales: Any  # f32[P, 2, K, page], or None
    pages: Any  # [P, K, page, W]


class Results(NamedTuple):
    """In the chip's main memory."""

    decodes: Any  # [D, bundles, bundle rows, Q]
    queries: Any  # [K, T * ratio, Q]
    pages: Any  # the argument's memory


class Scratch(NamedTuple):
    """Each core's own."""

    kv: Any  # [2, K, block, W], two blocks of keys and values
    kv_scales: Any  # f32[2, pages, 2, K, page], or None
    decode_queries: Any  # [2, bundles, bundle rows, Q]
    decode_rows: Any  # [2, K padded, W]
    decode_max: Any  # f32[bundles, bundle rows, 128], the running maximum in all lanes
    decode_sum: Any  # f32[bundles, bundle rows, 128], the running sum, to be added up over lanes
    decode_acc: Any  # f32[bundles, bundle rows, Q], the running output
    decode_out: Any  # [2, bundles, bundle rows, Q]
    written: Any  # [2, K, tile, W], tiles on their way to their pages
    queries: Any  # [K, rows, Q]
    state_max: Any  # f32[K, rows, 128]
    state_sum: Any  # f32[K, rows, 128]
    state_out: Any  # f32[K, rows, Q]
    out: Any  # [K, rows, Q]
    row_last: Any  # i32[rows, 128], the last token a row sees
    row_first: Any  # i32[rows, 128], the first one
    new: Any  # [K, page and more, W], new rows on their way to a page
    page: Any  # [K, page, W]
    kv_ready: Any  # DMA semaphores [2]
    inputs_ready: Any  # [2]
    out_done: Any  # [2]
    write_done: Any  # [2]
    done: Any  # [1]


@dataclass(frozen=True, slots=True)
class Call:
    """One core's run of the kernel."""

    shape: Geometry
    plan: Scalars
    arrays: Arrays
    results: Results
    scratch: Scratch
    core: jax.Array


def scratch_shapes(shape: Geometry, query_dtype: Any) -> Scratch:
    layout, heads = shape.layout, shape.num_kv_heads
    width, operand, page = layout.row_width, layout.operand_width, layout.page_size
    dtype, compute, tile = layout.dtype, shape.compute_dtype, layout.sublanes
    bundle = (2, shape.bundles, shape.bundle_rows, operand)
    state = (heads, shape.state_rows)
    scales = pltpu.VMEM((2, shape.pages_per_block, 2, heads, page), jnp.float32)
    return Scratch(
        kv=pltpu.VMEM((2, heads, shape.block, width), dtype),
        kv_scales=scales if layout.has_scales else None,
        decode_queries=pltpu.VMEM(bundle, compute),
        decode_rows=pltpu.VMEM((2, padded(heads, tile), width), dtype),
        decode_max=pltpu.VMEM((*bundle[1:3], LANES), jnp.float32),
        decode_sum=pltpu.VMEM((*bundle[1:3], LANES), jnp.float32),
        decode_acc=pltpu.VMEM(bundle[1:], jnp.float32),
        decode_out=pltpu.VMEM(bundle, query_dtype),
        written=pltpu.VMEM((2, heads, tile, width), dtype),
        queries=pltpu.VMEM((*state, operand), compute),
        state_max=pltpu.VMEM((*state, LANES), jnp.float32),
        state_sum=pltpu.VMEM((*state, LANES), jnp.float32),
        state_out=pltpu.VMEM((*state, operand), jnp.float32),
        out=pltpu.VMEM((heads, shape.query_rows, operand), query_dtype),
        row_last=pltpu.VMEM((shape.state_rows, LANES), jnp.int32),
        row_first=pltpu.VMEM((shape.state_rows, LANES), jnp.int32),
        new=pltpu.VMEM((heads, page + tile, width), dtype),
        page=pltpu.VMEM((heads, page, width), dtype),
        kv_ready=pltpu.SemaphoreType.DMA((2,)),
        inputs_ready=pltpu.SemaphoreType.DMA((2,)),
        out_done=pltpu.SemaphoreType.DMA((2,)),
        write_done=pltpu.SemaphoreType.DMA((2,)),
        done=pltpu.SemaphoreType.DMA((1,)),
    )


def padded(count: int, multiple: int) -> int:
    """The least multiple that holds `count`."""
    return -(-count // multiple) * multiple


def vmem_bytes(shape: Geometry, query_dtype: Any) -> int:
    """Bytes of on-chip memory that one core needs: its scratch memory and one turn of a loop."""
    scratch = [x for x in scratch_shapes(shape, query_dtype) if x is not None and not _is_semaphore(x)]
    layout, rows = shape.layout, max(shape.state_rows, shape.bundle_rows)
    # Logits and weights in f32 and as an operand; keys and values where they are not operands as they are.
    turn = rows * shape.block * (4 + 4 + shape.compute_dtype.itemsize)
    if layout.dtype != shape.compute_dtype:
        turn += 2 * shape.block * layout.operand_width * shape.compute_dtype.itemsize
    return sum(_padded_bytes(x.shape, x.dtype) for x in scratch) + turn


def _is_semaphore(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.number)


def _padded_bytes(dims: tuple[int, ...], dtype: Any) -> int:
    """Of an array in whole tiles of 128 lanes and the dtype's sublanes."""
    itemsize = jnp.dtype(dtype).itemsize
    *outer, sublanes, lanes = dims
    return math.prod(outer) * padded(sublanes, 32 // itemsize) * padded(lanes, LANES) * itemsize
