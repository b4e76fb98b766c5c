"""Which tile sizes a chip gets for a shape, and whether they fit its shared memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kernels.paged_attention.gpu.chips import Chip
from kernels.paged_attention.gpu.geometry import compute_dtype, padded_vector
from kernels.paged_attention.gpu.layout import GpuPageLayout
from kernels.paged_attention.gpu.tiles import Tile, TileSizes

_MOST_ROWS = 256


def choose_tiles(layout: GpuPageLayout, ratio: int, chip: Chip, *, is_bounded: bool = False) -> TileSizes:
    """The sizes for KV heads of such pages with `ratio` query heads each.

    is_bounded: keys are hidden behind a window or a chunk.

    Raises ValueError where no size does, or the chip cannot read such pages.
    """
    if ratio > _MOST_ROWS:
        raise ValueError(
            f"{ratio} query heads for one KV head: pallas_gpu takes {_MOST_ROWS}, choose the backend xla"
        )
    if layout.is_fp8 and not chip.has_fp8:
        raise ValueError(f"{chip.name} has no {layout.dtype}: give pages of int8")
    vector = padded_vector(layout.head_dim)
    if layout.dtype == np.float32:
        # Its products are no instructions of their own, and their operands lie in registers.
        many = Tile(32, 32, 8, 2) if vector < 128 else Tile(16, 16, 4, 2)
        sizes = TileSizes(Tile(16, 32, 8, 2), many, many)
    else:
        sizes = TileSizes(Tile(16, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2))
        is_narrow = layout.dtype.itemsize == 1
        # Operands of warps lie in registers, and so do keys and values on their way from what is stored to
        # what is multiplied.
        if vector >= 256 and (is_narrow or not chip.has_warp_groups):
            sizes = replace(sizes, group=Tile(64, 32, 8, 2), chunk=Tile(64, 32, 8, 2))
        elif vector >= 128 and is_narrow and not chip.has_warp_groups:
            sizes = replace(sizes, group=Tile(64, 32, 4, 2), chunk=Tile(64, 32, 8, 2))
        elif vector >= 128 and is_bounded and not chip.has_warp_groups:
            sizes = replace(sizes, chunk=Tile(128, 32, 8, 2))  # a third loop over keys, with its mask
    tiles = (sizes.decode, sizes.group, sizes.chunk)
    return TileSizes(*(_fitting(_with_rows(tile, ratio), layout, chip) for tile in tiles))


def _with_rows(tile: Tile, ratio: int) -> Tile:
    """The tile with room for one query at least."""
    return replace(tile, rows=max(tile.rows, 1 << (ratio - 1).bit_length()))


def _fitting(tile: Tile, layout: GpuPageLayout, chip: Chip) -> Tile:
    """The tile with as many stages, and then keys, as the chip's shared memory has room for."""
    tried = tile
    while shared_bytes(tried, layout) > chip.shared_bytes:
        if tried.stages > 1:
            tried = replace(tried, stages=tried.stages - 1)
        elif tried.keys > 16:
            tried = replace(tried, keys=tried.keys // 2)
        else:
            raise ValueError(
                f"attention over heads of {layout.head_dim} with {tried.rows} rows needs "
                f"{shared_bytes(tried, layout)} bytes of shared memory, {chip.name} has {chip.shared_bytes}: "
                "choose the backend xla"
            )
    return tried


def shared_bytes(tile: Tile, layout: GpuPageLayout) -> int:
    """Most bytes of shared memory that a thread block with this tile takes."""
    return tile.shared_bytes(
        padded_vector(layout.head_dim),
        layout.dtype.itemsize,
        compute_dtype(layout).itemsize,
        2 if layout.has_scales else 0,
    )
