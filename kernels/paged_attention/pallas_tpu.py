"""Ragged paged attention for TPUs in Pallas: one kernel for a step's chunks, decodes and their writes.

XLA puts the step's tokens in the kernel's order (`tpu.staging`). Then each core goes over its part of

- the decodes, some tens at a time: first the pages that prefix groups share, once for all members
  (`tpu.many`), then each decode by itself from the state that left, with its new token (`tpu.decode`);
- the blocks of prefill queries: old tokens from their pages, the step's own from its arrays (`tpu.many`);
- the writing of prefill chunks into their pages (`tpu.new_tokens`).

Keys and values come by DMA, a block ahead of what is computed. No core waits for another: what one writes to
pages is read there by none. The page at the seam between a chunk and the tokens before it may be read by one
core while another writes it, whose bytes for those tokens are the ones that are there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.layout import AttentionOptions, Groups, Rows
from kernels.paged_attention.tpu.call import Arrays, Call, Results, Scalars, Scratch, padded, scratch_shapes
from kernels.paged_attention.tpu.decode import attend_decodes
from kernels.paged_attention.tpu.geometry import Geometry
from kernels.paged_attention.tpu.layout import TpuPageLayout, TpuPages
from kernels.paged_attention.tpu.many import (
    group_keys,
    is_chunk,
    is_in_group,
    load_members,
    load_queries,
    pass_over,
    slot_keys,
    store_queries,
)
from kernels.paged_attention.tpu.new_tokens import write_new_tokens
from kernels.paged_attention.tpu.staging import gather_results, make_arrays, make_plan
from kernels.paged_attention.tpu.tiles import TileSizes
from kernels.paged_attention.tpu.tuning import check_page_dtype, choose_tiles, vmem_budget

KERNEL_NAME = "ragged_attention"
_SMALLEST = TileSizes(block=128, decodes=16, queries=16)
# Scalar memory is 1 MiB; the rest of the plan is a few words a sequence.
_MAX_TABLE_BYTES = 768 * 2**10


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: TpuPages,
    rows: Rows,
    groups: Groups,
    options: AttentionOptions,
    layout: TpuPageLayout,
    sinks: jax.Array | None,
    tiles: TileSizes | None = None,
    num_cores: int | None = None,
) -> tuple[jax.Array, TpuPages]:
    """See `kernels.paged_attention.attend`.

    tiles, num_cores: instead of those of the chip that is compiled for.

    Raises ValueError for what the kernel cannot do, with what to do about it.
    """
    shape = shape_of(q, k, v, pages, rows, groups, options, layout, tiles)
    num_cores = num_cores or _chip().num_cores
    new_rows, new_scales = layout.packed_rows(k, v)
    if new_scales is not None:
        pages = layout.write_scales(
            pages, new_scales, *layout.token_places(rows, q.shape[0], pages.num_pages)
        )
    plan = make_plan(shape, rows, groups, num_cores)
    arrays = make_arrays(shape, q, new_rows, new_scales, pages, plan, sinks)
    results = _call_kernel(shape, plan, arrays, q.dtype, num_cores)
    return gather_results(shape, q, rows, results), pages._replace(rows=results.pages)


def _chip() -> pltpu.TpuInfo:
    """The chip that is compiled for; in interpret mode, on any machine, the one whose tiles are used."""
    if pltpu.is_tpu_device():
        return pltpu.get_tpu_info()
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)


def shape_of(
    q: Any,
    k: Any,
    v: Any,
    pages: Any,
    rows: Rows,
    groups: Groups,
    options: AttentionOptions,
    layout: TpuPageLayout,
    tiles: TileSizes | None = None,
) -> Geometry:
    """The static shapes of a call, with the tiles of the chip that is compiled for where none are given."""
    num_slots, table_width = rows.page_table.shape

    def shape(tiles: TileSizes) -> Geometry:
        return Geometry(
            layout=layout,
            ratio=q.shape[1] // layout.num_kv_heads,
            options=options,
            tiles=tiles,
            num_slots=num_slots,
            table_width=table_width,
            num_decodes=padded(min(num_slots, q.shape[0]), tiles.decodes),
            num_tokens=padded(q.shape[0], tiles.queries),
            num_groups=groups.slot_start.shape[0],
        )

    smallest = _checked(shape(_SMALLEST))
    if pltpu.is_tpu_device():
        check_page_dtype(layout.dtype, _chip())
    return shape(tiles or choose_tiles(smallest, q.dtype, _chip()))


def _checked(shape: Geometry) -> Geometry:
    """The shape, if the kernel can do it."""
    layout, table = shape.layout, shape.num_slots * shape.table_width
    if not shape.options.scale > 0:
        raise ValueError(f"AttentionOptions.scale is {shape.options.scale}: pallas_tpu needs a positive one")
    if layout.page_size < layout.sublanes:
        raise ValueError(
            f"page_size is {layout.page_size}: pallas_tpu writes {layout.dtype} pages by tiles of "
            f"{layout.sublanes} tokens, give that or more"
        )
    if 4 * table > _MAX_TABLE_BYTES:
        raise ValueError(
            f"the page tables of {shape.num_slots} sequences with {shape.table_width} pages each take "
            f"{4 * table} bytes and {_MAX_TABLE_BYTES} of scalar memory are there: take larger pages or "
            "fewer sequences"
        )
    return shape


def _call_kernel(shape: Geometry, plan: Scalars, arrays: Arrays, dtype: Any, num_cores: int) -> Results:
    operand = shape.layout.operand_width
    out_shape = Results(
        decodes=jax.ShapeDtypeStruct((shape.num_decodes, shape.bundles, shape.bundle_rows, operand), dtype),
        queries=jax.ShapeDtypeStruct((shape.num_kv_heads, shape.num_tokens * shape.ratio, operand), dtype),
        pages=jax.ShapeDtypeStruct(arrays.pages.shape, arrays.pages.dtype),
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = jax.tree.map(lambda _: anywhere, arrays)
    if arrays.decode_start is not None:
        in_specs = in_specs._replace(decode_start=pl.BlockSpec(memory_space=pltpu.VMEM))
    scratch = scratch_shapes(shape, dtype)
    flat_scratch, scratch_tree = jax.tree.flatten(scratch, is_leaf=lambda x: not isinstance(x, Scratch))
    flat_inputs, input_tree = jax.tree.flatten((plan, arrays))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(plan),
        grid=(num_cores,),
        in_specs=jax.tree.leaves(in_specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
        out_specs=[anywhere] * len(out_shape),
        scratch_shapes=flat_scratch,
    )
    call = pl.pallas_call(
        partial(_kernel, shape, input_tree, scratch_tree),
        grid_spec=grid,
        out_shape=list(out_shape),
        input_output_aliases={len(flat_inputs) - 1: len(out_shape) - 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_budget(_chip())
        ),
        name=KERNEL_NAME,
    )
    return Results(*call(*flat_inputs))


def _kernel(shape: Geometry, input_tree: Any, scratch_tree: Any, *refs: Any) -> None:
    num_inputs, num_results = input_tree.num_leaves, len(Results._fields)
    plan, arrays = jax.tree.unflatten(input_tree, refs[:num_inputs])
    results = Results(*refs[num_inputs : num_inputs + num_results])
    scratch = jax.tree.unflatten(scratch_tree, refs[num_inputs + num_results :])
    call = Call(shape, plan, arrays, results, scratch, pl.program_id(0))

    first_decode, first_query = plan.core_decodes[call.core], plan.core_queries[call.core]
    num_decodes = plan.core_decodes[call.core + 1] - first_decode
    num_queries = plan.core_queries[call.core + 1] - first_query

    def unit(index: Any, carry: None) -> None:
        is_decode = index < num_decodes
        _attend_unit(call, is_decode, jnp.where(is_decode, first_decode, first_query - num_decodes) + index)

    def write(slot: Any, carry: None) -> None:
        write_new_tokens(call, slot)

    jax.lax.fori_loop(0, num_decodes + num_queries, unit, None)
    jax.lax.fori_loop(plan.core_writes[call.core], plan.core_writes[call.core + 1], write, None)


def _attend_unit(call: Call, is_decode: Any, block: Any) -> None:
    """A block of decodes, or one of queries of prefill chunks."""
    shape, plan = call.shape, call.plan
    decode_block, query_block = jnp.where(is_decode, block, 0), jnp.where(is_decode, 0, block)
    has_groups = is_decode & (plan.block_shared[decode_block] > 0)
    first_slot, last_slot = plan.first_slot[query_block], plan.last_slot[query_block]
    has_queries = ~is_decode & (first_slot <= last_slot)
    pl.when(has_groups)(lambda: load_members(call, block))
    pl.when(has_queries)(lambda: load_queries(call, block))

    def one(index: Any, carry: None) -> None:
        is_some = jax.lax.cond(
            is_decode, lambda: is_in_group(call, index, block), lambda: is_chunk(call, index)
        )

        @pl.when(is_some)
        def _():
            keys = jax.lax.cond(
                is_decode, lambda: group_keys(call, index, block), lambda: slot_keys(call, index, block)
            )
            pass_over(call, keys)

    begin = jnp.where(is_decode, 0, first_slot)
    end = jnp.where(is_decode, jnp.where(has_groups, plan.num_groups[0], 0), last_slot + 1)
    jax.lax.fori_loop(begin, end, one, None)
    pl.when(has_queries)(lambda: store_queries(call, block))

    @pl.when(is_decode)
    def _():
        first = block * shape.tiles.decodes
        attend_decodes(call, first, jnp.minimum(first + shape.tiles.decodes, plan.num_decodes[0]))
