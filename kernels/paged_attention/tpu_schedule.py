"""What attention costs on TPUs, by the compiler: `python -m kernels.paged_attention.tpu_schedule`.

Compiles the kernel, and jax's own `ragged_paged_attention`, for each chip and model shape with libtpu (no TPU
is needed) and prints a table of their inner loops, beside the time that the same keys and values take to come
from memory at the chip's bandwidth. It is a static count: it compares kernels and tells what bounds them, and
is no measured speed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as peer

from kernels.paged_attention import pallas_tpu
from kernels.paged_attention.ahead_of_time import compile_for
from kernels.paged_attention.model_shapes import MODEL_SHAPES, ModelShape, step_arguments
from kernels.paged_attention.tpu.layout import TpuPageLayout
from kernels.paged_attention.tpu.schedule import Loop, Schedule, read_schedule
from kernels.paged_attention.tpu.tiles import TileSizes
from kernels.paged_attention.tpu.topology import (
    TOPOLOGIES,
    is_installed,
    one_device_mesh,
    prepare,
)

_PAGE_SIZE = 64
_PEER_PAGES, _PEER_QUERIES = 8, 32
_GROUP_SIZE = 64
_HEADING = """# Attention on TPUs, by the compiler

A count of the instructions that libtpu schedules, not a measured speed: one bundle is one cycle of a core,
waits for memory are not among them. Each line is the inner loop for one block of KV tokens, all KV heads of
the shape. *queries*: how many the loop serves (decode 1; group: decodes that share a prefix; prefill: queries
of a chunk; jax: its own kernel, which pads a decode to as many). *DMA cycles*: in which the core's share of
the chip's bandwidth brings these keys and values. *of DMA*: below 1, memory bounds the loop. *MXU*: bundles
that use the matrix unit.
"""
_UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")


@dataclass(frozen=True, slots=True)
class Row:
    """One inner loop. All counts are for one block of KV tokens and all KV heads, on one core."""

    chip: str
    shape: str
    path: str
    """decode: one query; group: decodes on one prefix; prefill: a block of queries; jax: the peer."""
    rows: int
    """Queries that the loop serves; of a group of 64 decodes, those that share a pass."""
    kv_tokens: int
    bundles: int
    mxu_share: float
    """Of the bundles, those that use the matrix unit."""
    units: dict[str, float]
    """Slots used of those there are."""
    spills: int
    dma_cycles: float
    """Of these keys and values at the core's share of the bandwidth."""

    @property
    def bundles_per_kv_token(self) -> float:
        return self.bundles / self.kv_tokens

    @property
    def bundles_per_query(self) -> float:
        """And KV token."""
        return self.bundles_per_kv_token / self.rows

    @property
    def of_dma(self) -> float:
        """Below 1, memory bounds the loop; above it, the core does."""
        return self.bundles / self.dma_cycles


def clock_hz(chip: pltpu.TpuInfo) -> float:
    """Cycles a second: a matrix unit does one row of multiply-adds a cycle, from v6e (1.75 GHz) on two."""
    rows = 2 if chip.generation >= 6 else 1
    return chip.bf16_ops_per_second / (2 * rows * chip.num_mxus * chip.mxu_column_size**2)


def dma_cycles(chip: pltpu.TpuInfo, num_bytes: int) -> float:
    """Cycles in which a core's share of the memory bandwidth moves `num_bytes`."""
    return num_bytes / chip.mem_bw_bytes_per_second * clock_hz(chip)


def measure(chip: str, name: str) -> list[Row]:
    """The rows of one chip and shape. Must run in a process in which libtpu has not been loaded yet."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(chip, Path(folder))
        mesh = one_device_mesh(chip)
        with jax.sharding.set_mesh(mesh):
            info = pltpu.get_tpu_info()
        shape = MODEL_SHAPES[name]
        heads = shape.num_kv_heads
        schedule, tiles, token_bytes = _own_schedule(mesh, shape, Path(folder))
        row = partial(_row, info, chip, name, schedule, token_bytes)
        decode = schedule.matrix_loops()[-1]
        # One turn of the first loop is one KV head. Of a single one there is no loop: it is read where there
        # are two, and counted once.
        if heads == 1:
            two_heads = replace(shape, num_heads=2 * shape.num_heads, num_kv_heads=2)
            schedule, tiles, _ = _own_schedule(mesh, two_heads, Path(folder))
        free = schedule.matrix_loops()[0]
        rows = [
            row("decode", decode, 1, tiles.block, tiles.block // _PAGE_SIZE, 1),
            row("group", free, min(tiles.decodes, _GROUP_SIZE), tiles.block, 1, heads),
            row("prefill", free, tiles.queries, tiles.block, 1, heads),
        ]
        peer_schedule = _peer_schedule(mesh, shape, Path(folder), info)
        if peer_schedule is not None:
            block = _PEER_PAGES * _PAGE_SIZE
            peer_bytes = 2 * heads * shape.head_dim * 2
            loop = peer_schedule.matrix_loops()[0]
            rows.append(
                _row(info, chip, name, peer_schedule, peer_bytes, "jax", loop, _PEER_QUERIES, block, 1, 1)
            )
        return rows


def _row(
    info: pltpu.TpuInfo,
    chip: str,
    name: str,
    schedule: Schedule,
    token_bytes: int,
    path: str,
    loop: Loop,
    rows: int,
    kv_tokens: int,
    copies: int,
    turns: int,
) -> Row:
    bundles = loop.cycles(copies)
    return Row(
        chip=chip,
        shape=name,
        path=path,
        rows=rows,
        kv_tokens=kv_tokens,
        bundles=bundles * turns,
        mxu_share=loop.bundles_used["MXU"] / bundles,
        units={unit: loop.slots_used[unit] / (bundles * schedule.capacity[unit]) for unit in _UNITS},
        spills=loop.num_spills * turns,
        dma_cycles=dma_cycles(info, token_bytes * kv_tokens),
    )


def _own_schedule(mesh: Any, shape: ModelShape, folder: Path) -> tuple[Schedule, TileSizes, int]:
    """Of our kernel, with its tiles and the bytes of a token's keys and values."""
    layout = TpuPageLayout(
        "pallas_tpu", shape.num_kv_heads, shape.head_dim, _PAGE_SIZE, np.dtype(jnp.bfloat16)
    )
    arguments = step_arguments(shape, layout)
    own = partial(pallas_tpu.attend, options=shape.options, layout=layout, sinks=None)
    compile_for(mesh, own, arguments, donate_argnums=3)
    with jax.sharding.set_mesh(mesh):
        tiles = pallas_tpu.shape_of(*arguments, shape.options, layout).tiles
    schedule = read_schedule(folder, pallas_tpu.KERNEL_NAME)
    for path in folder.glob(f"*{pallas_tpu.KERNEL_NAME}*"):  # the next one is called so too
        path.unlink()
    return schedule, tiles, layout.page_bytes // _PAGE_SIZE


def _peer_schedule(mesh: Any, shape: ModelShape, folder: Path, info: pltpu.TpuInfo) -> Schedule | None:
    """Of jax's own kernel; None where it does not compile for the shape, which it says on stderr."""

    def numbers(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.int32)

    heads, dim = shape.num_kv_heads, shape.head_dim
    arguments = (
        jax.ShapeDtypeStruct((512, shape.num_heads, dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((1024, _PAGE_SIZE, 2 * heads, dim), jnp.bfloat16),
        numbers(64),
        numbers(64, 64),
        numbers(65),
        numbers(1),
    )
    function = partial(
        peer.ragged_paged_attention,
        sm_scale=shape.options.scale,
        sliding_window=shape.window,
        num_kv_pages_per_block=_PEER_PAGES,
        num_queries_per_block=_PEER_QUERIES,
        vmem_limit_bytes=int(min(info.vmem_capacity_bytes * 0.9, 64 * 2**20)),
    )
    try:
        compile_for(mesh, function, arguments)
    except Exception as error:  # its own checks and Mosaic's, which have no type in common
        reason = " ".join(str(error).split())[:200]
        print(f"jax's kernel does not compile for {shape}: {reason}", file=sys.stderr)
        return None
    return read_schedule(folder, "ragged_paged_attention_kernel")


def as_table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    head = [
        "chip",
        "shape",
        "path",
        "queries",
        "KV tokens",
        "bundles",
        "a KV token",
        "and query",
        "DMA cycles",
        "of DMA",
        "MXU",
    ]
    head += [f"{unit} slots" for unit in _UNITS] + ["spills"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append(
            [
                row.chip,
                row.shape,
                row.path,
                str(row.rows),
                str(row.kv_tokens),
                str(row.bundles),
                f"{row.bundles_per_kv_token:.2f}",
                f"{row.bundles_per_query:.3f}",
                f"{row.dma_cycles:.0f}",
                f"{row.of_dma:.2f}",
                f"{row.mxu_share:.0%}",
                *(f"{row.units[unit]:.0%}" for unit in _UNITS),
                str(row.spills),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_apart(chip: str, name: str) -> list[Row]:
    """`measure` in a process of its own. Raises RuntimeError with what it printed when it fails."""
    command = [sys.executable, "-m", __spec__.name, "--one", chip, name]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{chip}, {name}: {finished.stderr[-2000:]}")
    print(finished.stderr, end="", file=sys.stderr)
    return [Row(**row) for row in json.loads(finished.stdout.splitlines()[-1])]


def measured_shapes(chip: str, names: Sequence[str]) -> list[Row]:
    """The rows of several models on a chip; models that attend alike are compiled once."""
    rows: list[Row] = []
    known: dict[ModelShape, list[Row]] = {}
    for name in names:
        shape = MODEL_SHAPES[name]
        if shape not in known:
            print(f"compiling {name} for {chip}", file=sys.stderr)
            known[shape] = measured_apart(chip, name)
        rows += [replace(row, shape=name) for row in known[shape]]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--shapes", nargs="+", choices=MODEL_SHAPES, default=list(MODEL_SHAPES))
    parser.add_argument("--out", type=Path, help="a folder: also write schedule.md and schedule.json there")
    parser.add_argument("--one", nargs=2, metavar=("CHIP", "SHAPE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if not is_installed():
        parser.error("libtpu is not installed: pip install 'tidemill[tpu-compile]'")
    if chosen.one:
        print(json.dumps([asdict(row) for row in measure(*chosen.one)]))
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    rows: list[Row] = []
    for chip in chosen.chips:
        rows += measured_shapes(chip, chosen.shapes)
        if chosen.out:  # after each chip: it takes minutes
            write_results(chosen.out, rows, shlex.join(["python", "-m", __spec__.name, *given]))
    print(as_table(rows))
    return 0


def write_results(folder: Path, rows: Sequence[Row], command: str) -> None:
    """Keep the rows, and what made them, as a page to read and as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("jax", "libtpu")}
    kept = {"command": command, **versions, "rows": [asdict(row) for row in rows]}
    (folder / "schedule.json").write_text(json.dumps(kept, indent=1) + "\n")
    made_with = ", ".join(f"{name} {number}" for name, number in versions.items())
    (folder / "schedule.md").write_text(f"{_HEADING}\n`{command}` ({made_with})\n\n{as_table(rows)}\n")


if __name__ == "__main__":
    sys.exit(main())
