"""Ragged paged attention for NVIDIA GPUs in Pallas, through Triton: five kernels for a step.

1. `gpu.writing` puts the step's keys and values into their pages, so that all others read pages only.
2. `gpu.chunk` takes the prefill chunks, a block of queries at a time.
3. `gpu.group` takes the pages that prefix groups share, once for many of their decodes.
4. `gpu.decode` takes the rest of each decode's pages, split into parts, so that few decodes fill the chip.
5. `gpu.combine` merges what 3 and 4 found.

Each is a grid of thread blocks whose size is static; blocks that the step has no work for end at once.

Why Triton and not Mosaic GPU, the other way from Pallas to a GPU: Mosaic's asynchronous products and bulk
copies begin with sm_90, so an A100 would need a second set of kernels, and Triton makes both from this one:
products of warp groups on an H100, of single warps on an A100, keys copied ahead on either. Which is faster
has not been measured.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.paged_attention.gpu.chips import current_chip
from kernels.paged_attention.gpu.chunk import attend_chunks
from kernels.paged_attention.gpu.combine import combine_parts
from kernels.paged_attention.gpu.decode import attend_decodes
from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.gpu.group import attend_groups
from kernels.paged_attention.gpu.layout import GpuPageLayout
from kernels.paged_attention.gpu.plan import make_plan
from kernels.paged_attention.gpu.tiles import TileSizes
from kernels.paged_attention.gpu.tokens import as_rows
from kernels.paged_attention.gpu.tuning import choose_tiles
from kernels.paged_attention.gpu.writing import write_tokens
from kernels.paged_attention.layout import AttentionOptions, Groups, Pages, Rows

# The kernels number the rows of pages (one for each page, head and token) in 32 bits.
_MAX_ROWS = 2**31 - 1


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    rows: Rows,
    groups: Groups,
    options: AttentionOptions,
    layout: GpuPageLayout,
    sinks: jax.Array | None,
    tiles: TileSizes | None = None,
) -> tuple[jax.Array, Pages]:
    """See `kernels.paged_attention.attend`.

    tiles: instead of those of the chip that is compiled for.

    Raises ValueError for what the kernels cannot do, with what to do about it.
    """
    shape = shape_of(q, k, v, pages, rows, groups, options, layout, tiles)
    plan = make_plan(shape, rows, groups)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    stored = write_tokens(shape, as_rows(pages), layout.packed(k, v), plan)
    out = attend_chunks(shape, jnp.zeros_like(q), q, stored, plan, sinks)
    parts = (attend_groups(shape, q, stored, plan), attend_decodes(shape, q, stored, plan))
    out = combine_parts(shape, out, parts, plan, sinks)
    return out, jax.tree.map(lambda x, like: x.reshape(like.shape), stored, pages)


def shape_of(
    q: Any,
    k: Any,
    v: Any,
    pages: Pages,
    rows: Rows,
    groups: Groups,
    options: AttentionOptions,
    layout: GpuPageLayout,
    tiles: TileSizes | None = None,
) -> Geometry:
    """The static shapes of a call, with the tiles of the chip that is compiled for where none are given."""
    num_rows = pages.num_pages * layout.num_kv_heads * layout.page_size
    if num_rows > _MAX_ROWS:
        raise ValueError(
            f"{pages.num_pages} pages of {layout.num_kv_heads} KV heads and {layout.page_size} tokens are "
            f"{num_rows} rows, pallas_gpu numbers {_MAX_ROWS} at most: lower engine.kv_cache_bytes"
        )
    chip, ratio = current_chip(), q.shape[1] // layout.num_kv_heads
    num_slots, table_width = rows.page_table.shape
    return Geometry(
        layout=layout,
        ratio=ratio,
        options=options,
        tiles=tiles or choose_tiles(layout, ratio, chip, is_bounded=options.is_bounded),
        num_cores=chip.num_cores,
        num_slots=num_slots,
        table_width=table_width,
        num_tokens=q.shape[0],
        num_groups=groups.slot_start.shape[0],
    )
