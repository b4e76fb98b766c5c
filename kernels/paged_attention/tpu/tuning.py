"""Which tile sizes a chip gets for a shape, and whether they fit its on-chip memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.call import vmem_bytes
from kernels.paged_attention.tpu.geometry import Geometry
from kernels.paged_attention.tpu.layout import LANES
from kernels.paged_attention.tpu.tiles import TileSizes

# Rows of one KV head that a block of keys is multiplied with: enough that the matrix unit works most of the
# time and not only takes keys in. Read from `tpu_schedule`; chips from v6e on have a wider matrix unit.
_ROWS = 256
_WIDE_ROWS = 512
_WIDE_GENERATION = 6
_MAX_BLOCK = 512
# What the kernel may take of a core's on-chip memory. v4 has 16 MiB, and XLA keeps some for itself.
_MAX_SHARE = 0.875
_MAX_BYTES = 48 * 2**20


def choose_tiles(shape: Geometry, query_dtype: Any, chip: pltpu.TpuInfo) -> TileSizes:
    """The largest of the sizes that are good on `chip` which fit it; `shape.tiles` does not matter.

    Raises ValueError when not even the smallest do.
    """
    budget = vmem_budget(chip)
    rows = _WIDE_ROWS if chip.generation >= _WIDE_GENERATION else _ROWS
    page = shape.layout.page_size
    tried: TileSizes | None = None
    while rows >= 16:
        block = max(_MAX_BLOCK, page)
        while block >= max(LANES, page):
            tried = TileSizes(block, *_blocks_of(rows, shape))
            if vmem_bytes(replace(shape, tiles=tried), query_dtype) <= budget:
                return tried
            block //= 2
        rows //= 2
    assert tried is not None
    needed = vmem_bytes(replace(shape, tiles=tried), query_dtype)
    raise ValueError(
        f"attention over {shape.num_kv_heads} KV heads of {shape.layout.head_dim} in pages of {page} needs "
        f"{needed} bytes of on-chip memory, TPU {chip.chip_version} lends {budget}: take smaller pages, or "
        "spread the heads over more chips"
    )


def check_page_dtype(dtype: np.dtype, chip: pltpu.TpuInfo) -> None:
    """Raise ValueError where `chip` does not compute in the pages' dtype."""
    if dtype == jnp.float8_e4m3fn and not chip.fp8_ops_per_second:
        raise ValueError(
            f"TPU {chip.chip_version} has no fp8, which its KV pages are to be kept in: give int8 or bfloat16"
        )


def vmem_budget(chip: pltpu.TpuInfo) -> int:
    """Bytes of a core's on-chip memory that the kernel may use."""
    return min(int(chip.vmem_capacity_bytes * _MAX_SHARE), _MAX_BYTES)


def _blocks_of(rows: int, shape: Geometry) -> tuple[int, int]:
    """Decodes and queries that make about `rows` rows a KV head, in the sizes that tiles allow."""
    decodes = 1 << max(4, min(7, (rows // shape.head_rows).bit_length() - 1))
    queries = max(16, decodes * shape.head_rows // shape.ratio // 16 * 16)
    return decodes, queries
