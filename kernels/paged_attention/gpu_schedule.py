"""What the kernels take of GPUs, by the compiler: `python -m kernels.paged_attention.gpu_schedule`.

Compiles the kernels for each chip and model shape with XLA's plugin for CUDA (no GPU is needed), has `ptxas`
assemble them, and prints a table: registers, spills, shared memory and how many thread blocks that leaves
room for on a core. It is a static count: it tells what fits and what does not, and is no measured speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from kernels.paged_attention import pallas_gpu
from kernels.paged_attention.ahead_of_time import compile_for
from kernels.paged_attention.gpu.assembly import Assembled, assemble
from kernels.paged_attention.gpu.layout import GpuPageLayout
from kernels.paged_attention.gpu.targets import TARGETS, Target, missing, one_device_mesh, prepare
from kernels.paged_attention.gpu.tiles import Tile
from kernels.paged_attention.gpu.tuning import shared_bytes
from kernels.paged_attention.model_shapes import MODEL_SHAPES, step_arguments

_PREFIX = "paged_attention_"
_TILED = ("decode", "group", "chunk")
PAGE_DTYPES = ("bfloat16", "int8", "float8_e4m3fn", "float32")


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel on one chip."""

    chip: str
    shape: str
    pages: str
    """Their dtype and size."""
    kernel: str
    tile: str
    """Rows x keys, and stages; of kernels that have tiles."""
    threads: int
    registers: int
    """Of a thread, of 255."""
    spill_bytes: int
    """Of a thread."""
    shared_bytes: int
    """Of a thread block."""
    shared_bound: int
    """What `Tile.shared_bytes` says that it takes at most; 0: none."""
    blocks: int
    """Thread blocks that a core has room for."""
    products: str
    """Instructions of matrix products, and of which kind."""
    async_copies: int


def measure(chip: str, name: str, page_size: int, dtype: str) -> list[Row]:
    """The rows of one chip and shape. Must run in a process in which XLA has not been used yet."""
    target = TARGETS[chip]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        mesh = one_device_mesh(chip)
        shape = MODEL_SHAPES[name]
        layout = GpuPageLayout("pallas_gpu", shape.num_kv_heads, shape.head_dim, page_size, np.dtype(dtype))
        arguments = step_arguments(shape, layout)
        function = partial(pallas_gpu.attend, options=shape.options, layout=layout, sinks=None)
        compile_for(mesh, function, arguments, donate_argnums=3)
        with jax.sharding.set_mesh(mesh):
            tiles = pallas_gpu.shape_of(*arguments, shape.options, layout).tiles
        kernels = assemble(Path(folder), target.architecture, _PREFIX)
    rows = []
    for kernel in kernels:
        kind = kernel.name.removeprefix(_PREFIX)
        tile: Tile | None = getattr(tiles, kind) if kind in _TILED else None
        rows.append(
            Row(
                chip=chip,
                shape=name,
                pages=f"{dtype} {page_size}",
                kernel=kind,
                tile="" if tile is None else f"{tile.rows} x {tile.keys}, {tile.stages}",
                threads=kernel.threads,
                registers=kernel.registers,
                spill_bytes=kernel.spill_bytes,
                shared_bytes=kernel.shared_bytes,
                shared_bound=0 if tile is None else shared_bytes(tile, layout),
                blocks=blocks_of_core(kernel, target),
                products=_products(kernel),
                async_copies=kernel.async_copies,
            )
        )
    return rows


def blocks_of_core(kernel: Assembled, target: Target) -> int:
    """How many thread blocks run on a core at once: CUDA hands registers out 256 a warp, and keeps 1 KiB of
    shared memory for each block."""
    of_warp = -(-kernel.registers * 32 // 256) * 256
    warps = kernel.threads // 32
    by_registers = 65536 // (of_warp * warps)
    by_shared = target.shared_of_core // (kernel.shared_bytes + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


def _products(kernel: Assembled) -> str:
    if not kernel.products:
        return ""
    return f"{kernel.products} {'wgmma' if kernel.has_warp_groups else 'mma'}"


def as_table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    head = ["chip", "shape", "pages", "kernel", "tile, stages", "threads", "registers", "spills, B"]
    head += ["shared, B", "bound, B", "blocks a core", "products", "async copies"]
    lines = [head, ["---"] * len(head)]
    lines += [[str(value) for value in asdict(row).values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_apart(*case: str) -> list[Row]:
    """`measure` in a process of its own. Raises RuntimeError with what it printed when it fails."""
    command = [sys.executable, "-m", __spec__.name, "--one", *case]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{', '.join(case)}: {finished.stderr[-2000:]}")
    return [Row(**row) for row in json.loads(finished.stdout.splitlines()[-1])]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--chips", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", choices=MODEL_SHAPES, default=list(MODEL_SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=PAGE_DTYPES, default=["bfloat16"])
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    lacking = missing()
    if lacking is not None:
        parser.error(lacking)
    if chosen.one:
        chip, name, page_size, dtype = chosen.one
        print(json.dumps([asdict(row) for row in measure(chip, name, int(page_size), dtype)]))
        return 0
    rows = [
        row
        for chip in chosen.chips
        for name in chosen.shapes
        for dtype in chosen.dtypes
        for row in measured_apart(chip, name, str(chosen.page_size), dtype)
    ]
    print(as_table(rows))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
