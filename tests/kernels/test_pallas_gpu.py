"""The GPU kernels, interpreted: equal to the reference, within a chip's memory, refusing what they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.paged_attention import AttentionOptions, Rows, page_layout, pallas_gpu
from kernels.paged_attention.gpu.calling import interpreted
from kernels.paged_attention.gpu.chips import CHIPS, OTHER, chip_of
from kernels.paged_attention.gpu.layout import GpuPageLayout
from kernels.paged_attention.gpu.tiles import Tile, TileSizes
from kernels.paged_attention.gpu.tuning import choose_tiles, shared_bytes
from kernels.paged_attention.model_shapes import MODEL_SHAPES, step_arguments
from tests.kernels.steps import Sequence_, Shape, check_step, random_rows

# Small enough that every row has several tiles, and some of them none that is whole.
SMALL_TILES = TileSizes(decode=Tile(16, 32, 4, 2), group=Tile(16, 16, 4, 2), chunk=Tile(32, 16, 4, 2))


@dataclass(frozen=True)
class GpuShape(Shape):
    tiles: TileSizes = SMALL_TILES

    def attend(self, q: Any, k: Any, v: Any, pages: Any, rows: Any, groups: Any, sinks: Any) -> Any:
        layout: Any = self.layout
        return pallas_gpu.attend(q, k, v, pages, rows, groups, self.options, layout, sinks, tiles=self.tiles)


@pytest.fixture(autouse=True)
def run_interpreted() -> Iterator[None]:
    if jax.default_backend() == "gpu":
        yield
        return
    with interpreted():
        yield


def layout_of(kv_heads=2, head_dim=64, page_size=16, dtype="float32"):
    return GpuPageLayout("pallas_gpu", kv_heads, head_dim, page_size, np.dtype(dtype))


def check_steps(shape, num_steps, *, tolerance=2e-5, **sizes):
    for seed in range(num_steps):
        check_step(shape, random_rows(shape, seed, **sizes), seed, tolerance)


def test_any_step_equals_the_reference():
    """Groups of groups and chunks, with heads that fill no tile; then decodes with keys in parts."""
    shape = GpuShape(layout_of(kv_heads=3), ratio=3, options=AttentionOptions(scale=0.125))
    check_steps(shape, 3)
    check_step(shape, [Sequence_(2, 0, 520, 1), Sequence_(3, 0, 300, 1), Sequence_(4, 0, 0, 2)], 3, 2e-5)


def test_all_options_at_once():
    """Window, soft cap and sinks; pages larger than a tile, with scales; a head dim that fills none."""
    options = AttentionOptions(scale=0.2, window=70, soft_cap=4.0)
    layout = layout_of(head_dim=80, page_size=32, dtype="int8")
    check_steps(GpuShape(layout, ratio=2, options=options, has_sinks=True), 3, tolerance=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_pages_of_8_bits(dtype, page_size):
    """Tiles of several pages, and several tiles of a page."""
    shape = GpuShape(layout_of(page_size=page_size, dtype=dtype), 2, AttentionOptions(scale=0.1))
    check_steps(shape, 2, tolerance=2e-2)


def test_a_row_of_4096_tokens():
    """Among one-token rows, as the whole of one step and as the history of one decode."""
    shape = GpuShape(
        layout_of(kv_heads=1, page_size=64),
        ratio=2,
        options=AttentionOptions(scale=0.125),
        tiles=TileSizes(decode=Tile(16, 64, 4, 2), group=Tile(16, 64, 4, 2), chunk=Tile(128, 64, 4, 2)),
        num_tokens=4128,
        num_slots=4,
        num_pages=280,
    )
    rows = [Sequence_(2, 0, 4100, 1), Sequence_(3, 0, 0, 4096), Sequence_(4, 0, 0, 1)]
    check_step(shape, rows, 0, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize(
    ("kv_heads", "ratio", "head_dim", "dtype", "tolerance"),
    [
        (1, 8, 128, "bfloat16", 2e-2),
        (8, 4, 128, "bfloat16", 2e-2),
        (2, 12, 96, "float32", 2e-5),
        (3, 3, 64, "bfloat16", 2e-2),
        (5, 1, 256, "float32", 2e-5),
        (1, 71, 64, "float32", 2e-5),
        (2, 2, 128, "int8", 2e-2),
    ],
)
def test_shapes_with_the_tiles_of_a_chip(page_size, kv_heads, ratio, head_dim, dtype, tolerance):
    layout = layout_of(kv_heads, head_dim, page_size, dtype)
    options = AttentionOptions(scale=head_dim**-0.5)
    tiles = choose_tiles(layout, ratio, chip_of("NVIDIA H100 80GB HBM3"))
    check_steps(GpuShape(layout, ratio, options, tiles=tiles), 2, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(
    ("options", "has_sinks"),
    [
        (AttentionOptions(scale=0.3, window=1), False),
        (AttentionOptions(scale=0.3, window=20), True),
        (AttentionOptions(scale=0.3, chunk=50), True),
        (AttentionOptions(scale=0.3, chunk=16), False),
        (AttentionOptions(scale=1.5, soft_cap=5.0), False),
        (AttentionOptions(scale=-0.2), True),
    ],
)
def test_options(options, has_sinks, page_size):
    check_steps(GpuShape(layout_of(page_size=page_size), 4, options, has_sinks=has_sinks), 3)


@pytest.mark.parametrize("chip", [*CHIPS, OTHER], ids=lambda chip: chip.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_chosen_tiles_fit_the_chip(chip, dtype):
    heads = [(each.num_heads // each.num_kv_heads, each.head_dim) for each in MODEL_SHAPES.values()]
    for ratio, head_dim in [*heads, (1, 80), (71, 96), (256, 64)]:
        layout = layout_of(1, head_dim, 16, dtype)
        tiles = choose_tiles(layout, ratio, chip)
        for tile in (tiles.decode, tiles.group, tiles.chunk):
            assert tile.rows >= ratio
            assert shared_bytes(tile, layout) <= chip.shared_bytes


def test_chips_are_known_by_the_name_that_jax_has_for_them():
    assert chip_of("NVIDIA A100-SXM4-80GB").num_cores == 108
    assert chip_of("NVIDIA H200").has_warp_groups
    assert chip_of("NVIDIA GeForce RTX 4090") == OTHER


def refused(layout, **sizes):
    arguments = step_arguments(MODEL_SHAPES["SmolLM2-135M"], layout, **sizes)
    return pallas_gpu.shape_of(*arguments, AttentionOptions(scale=0.1), layout)


def test_what_cannot_be_done_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"272 query heads for one KV head: .* choose the backend xla"):
        choose_tiles(layout_of(1), 272, OTHER)
    with pytest.raises(
        ValueError, match="bytes of shared memory, another GPU has 101376: choose the backend"
    ):
        choose_tiles(layout_of(1, 4096), 1, OTHER)
    with pytest.raises(ValueError, match=r"rows, pallas_gpu numbers 2147483647 at most: lower engine"):
        refused(layout_of(3, 64, 512), num_pages=2**21)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("rows", (24, 32, 4, 2)), ("rows", (8, 32, 4, 2)), ("keys", (16, 8, 4, 2)), ("keys", (16, 512, 4, 2)),
     ("warps", (16, 32, 3, 2)), ("stages", (16, 32, 4, 0))],
)  # fmt: skip
def test_impossible_tiles_are_refused(name, sizes):
    with pytest.raises(ValueError, match=f"Tile.{name} is"):
        Tile(*sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 256])
def test_pages_hold_what_is_written_and_nothing_is_padded(dtype, head_dim):
    layout = page_layout("pallas_gpu", 3, head_dim, 32, dtype)
    pages = layout.empty(4)
    assert layout.page_bytes * 4 == sum(x.nbytes for x in jax.tree.leaves(pages))
    assert pages.keys.nbytes == 4 * 3 * head_dim * 32 * np.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((40, 3, head_dim)), jnp.float32) for _ in range(2))
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in ([0, 40], [40], [[2, 1]])))
    stored = layout.tokens(layout.write(pages, k, v, rows), np.array([2, 1]), 40)
    for got, want in zip(stored, (k, v), strict=True):
        tolerance = {"float32": 0, "bfloat16": 0.02, "int8": 0.03}[dtype]
        np.testing.assert_allclose(got.astype(np.float32), want, atol=tolerance)
