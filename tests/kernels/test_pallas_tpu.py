"""The TPU kernel, in TPU interpret mode: equal to the reference, without races, refusing what it cannot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention import AttentionOptions, Rows, page_layout, pallas_tpu
from kernels.paged_attention.model_shapes import MODEL_SHAPES, step_arguments
from kernels.paged_attention.tpu.call import vmem_bytes
from kernels.paged_attention.tpu.layout import TpuPageLayout
from kernels.paged_attention.tpu.tiles import TileSizes
from kernels.paged_attention.tpu.tuning import check_page_dtype, choose_tiles, vmem_budget
from tests.kernels.steps import Sequence_, Shape, check_step, random_rows


def layout_of(kv_heads=2, head_dim=64, page_size=16, dtype="float32"):
    return TpuPageLayout("pallas_tpu", kv_heads, head_dim, page_size, np.dtype(dtype))


def check_steps(shape, num_steps, capfd, *, tolerance=2e-5, **sizes):
    """Random steps of one shape, with race detection; on-chip memory begins as NaN."""
    parameters = pltpu.InterpretParams(
        detect_races=shape.num_cores == 1, num_cores_or_threads=shape.num_cores
    )
    with pltpu.force_tpu_interpret_mode(parameters):
        for seed in range(num_steps):
            check_step(shape, random_rows(shape, seed, **sizes), seed, tolerance)
    assert "RACE" not in capfd.readouterr().out


# Enough that some blocks of keys are seen as a whole by all rows, prefixes and chunks of the step among them.
LONG: Any = {"num_tokens": 320, "num_pages": 256}


def test_any_step_equals_the_reference(capfd):
    shape = Shape(layout_of(kv_heads=3), ratio=3, options=AttentionOptions(scale=0.125), **LONG)
    check_steps(shape, 1, capfd)


def test_all_options_on_two_cores(capfd):
    """Window, soft cap and sinks at once; a head dim that fills no vector; each core takes its part."""
    options = AttentionOptions(scale=0.2, window=180, soft_cap=4.0)
    shape = Shape(layout_of(head_dim=80), 2, options, num_cores=2, has_sinks=True, **LONG)
    check_steps(shape, 2, capfd)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([Sequence_(0, 24, own, 1) for own in (48, 60, 70)], id="group"),
        pytest.param([Sequence_(2, 0, 307, 16)], id="chunk"),
    ],
)
def test_a_window_that_begins_inside_a_block_for_some_rows_alone(rows):
    """The block from 128 or 256 on is before every row's last key, and not inside every row's window."""
    shape = Shape(layout_of(), 2, AttentionOptions(scale=0.125, window=180))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        check_step(shape, rows, 0, 2e-5)


def test_pages_of_bytes(capfd):
    """With a scale a token and head, not a number where there is no token."""
    check_steps(
        Shape(layout_of(page_size=32, dtype="int8"), 2, AttentionOptions(scale=0.1)), 1, capfd, tolerance=2e-2
    )


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
    ],
)
def test_shapes(page_size, kv_heads, ratio, head_dim, dtype, tolerance, capfd):
    layout = layout_of(kv_heads, head_dim, page_size, dtype)
    block = TileSizes(block=max(128, page_size), decodes=16, queries=32)
    options = AttentionOptions(scale=head_dim**-0.5)
    check_steps(Shape(layout, ratio, options, tiles=block), 2, capfd, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("page_size", "kv_heads", "head_dim"), [(32, 3, 64), (64, 2, 128)])
def test_pages_of_8_bits(dtype, page_size, kv_heads, head_dim, capfd):
    layout = layout_of(kv_heads, head_dim, page_size, dtype)
    check_steps(Shape(layout, 2, AttentionOptions(scale=0.1)), 3, capfd, tolerance=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "has_sinks"),
    [
        (AttentionOptions(scale=0.3, window=1), False),
        (AttentionOptions(scale=0.3, chunk=50), True),
        (AttentionOptions(scale=0.3, chunk=16), False),
        (AttentionOptions(scale=1.5, soft_cap=5.0), False),
    ],
)
def test_options(options, has_sinks, capfd):
    check_steps(Shape(layout_of(), 4, options, has_sinks=has_sinks), 3, capfd)


def test_a_row_of_4096_tokens(capfd):
    """Among one-token rows, as the whole of one step and as the history of one decode."""
    shape = Shape(
        layout_of(kv_heads=1, page_size=64),
        ratio=2,
        options=AttentionOptions(scale=0.125),
        tiles=TileSizes(block=512, decodes=16, queries=64),
        num_tokens=4128,
        num_pages=280,
    )
    rows = [Sequence_(2, 0, 4100, 1), Sequence_(3, 0, 0, 4096), Sequence_(4, 0, 0, 1)]
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        check_step(shape, rows, 0, 2e-5)


# Two pages of float32, 8 heads of 256 and 256 tokens, are 16 MiB: all that a v4 core has.
TOO_LARGE = {("TPU_V4", "Gemma-3-12B", 256, "float32")}


@pytest.mark.parametrize("chip", ["TPU_V4", "TPU_V5E", "TPU_V5P", "TPU_V6E", "TPU_7X"])
@pytest.mark.parametrize("name", MODEL_SHAPES)
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_chosen_tiles_fit_the_chip(chip, name, page_size, dtype):
    version = pltpu.ChipVersion[chip]
    info = pltpu.get_tpu_info_for_chip(version, 2 if version.supports_megacore else 1)
    model = MODEL_SHAPES[name]
    layout = layout_of(model.num_kv_heads, model.head_dim, max(page_size, 32), dtype)
    shape = pallas_tpu.shape_of(*step_arguments(model, layout), model.options, layout)
    if (chip, name, page_size, dtype) in TOO_LARGE:
        with pytest.raises(ValueError, match="take smaller pages"):
            choose_tiles(shape, jnp.bfloat16, info)
        return
    tiles = choose_tiles(shape, jnp.bfloat16, info)
    chosen = pallas_tpu.shape_of(*step_arguments(model, layout), model.options, layout, tiles)
    assert vmem_bytes(chosen, jnp.bfloat16) <= vmem_budget(info) <= info.vmem_capacity_bytes


def refused(layout, **options):
    arguments = step_arguments(MODEL_SHAPES["SmolLM2-135M"], layout, **options)
    return pallas_tpu.shape_of(*arguments, AttentionOptions(scale=0.1), layout)


def test_what_cannot_be_done_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="by tiles of 16 tokens, give that or more"):
        refused(layout_of(3, 64, 8, "bfloat16"))
    with pytest.raises(ValueError, match="scalar memory are there: take larger pages"):
        refused(layout_of(3, 64, 16), num_slots=256, table_width=1024)
    with pytest.raises(ValueError, match="take smaller pages"):
        refused(layout_of(9, 512, 512))
    arguments = step_arguments(MODEL_SHAPES["SmolLM2-135M"], layout_of(3))
    with pytest.raises(ValueError, match="needs a positive one"):
        pallas_tpu.shape_of(*arguments, AttentionOptions(scale=-1.0), layout_of(3))
    with pytest.raises(ValueError, match="is for TPUs and GPUs: give int8 to backend 'xla'"):
        page_layout("xla", 3, 64, 32, "float8_e4m3fn")


@pytest.mark.parametrize(("chip", "has_fp8"), [("V4", False), ("V5E", False), ("V6E", True), ("7X", True)])
def test_fp8_is_for_chips_that_compute_in_it(chip, has_fp8):
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[f"TPU_{chip}"], 1)
    for dtype in ("float32", "bfloat16", "int8"):
        check_page_dtype(np.dtype(dtype), info)
    if has_fp8:
        check_page_dtype(np.dtype("float8_e4m3fn"), info)
    else:
        with pytest.raises(ValueError, match=r"has no fp8.* give int8 or bfloat16"):
            check_page_dtype(np.dtype("float8_e4m3fn"), info)


def test_fp8_pages_keep_what_is_beyond_their_range_as_their_largest_value():
    layout = layout_of(1, 64, 32, "float8_e4m3fn")
    given = jnp.array([-jnp.inf, -1000.0, 448.0, 470.0, 1e9, 1.0], jnp.bfloat16)
    keys = jnp.broadcast_to(given[:, None, None], (6, 1, 64))
    rows, scales = layout.packed_rows(keys, keys)
    assert scales is None
    assert rows[:, 0, 0].astype(jnp.float32).tolist() == [-448.0, -448.0, 448.0, 448.0, 448.0, 1.0]


@pytest.mark.parametrize(
    "sizes",
    [{"block": 100}, {"block": 384}, {"decodes": 8}, {"decodes": 48}, {"queries": 0}, {"queries": 24}],
)
def test_impossible_tiles_are_refused(sizes):
    with pytest.raises(ValueError, match=f"TileSizes.{next(iter(sizes))} is"):
        TileSizes(**({"block": 128, "decodes": 16, "queries": 16} | sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_pages_hold_what_is_written_and_no_lane_is_wasted_at_64(dtype, head_dim):
    layout = page_layout("pallas_tpu", 3, head_dim, 32, dtype)
    pages = layout.empty(4)
    assert layout.page_bytes * 4 == sum(x.nbytes for x in jax.tree.leaves(pages))
    if head_dim == 64 and dtype != "int8":
        assert layout.page_bytes == 2 * 3 * 64 * 32 * np.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((40, 3, head_dim)), jnp.float32) for _ in range(2))
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in ([0, 40], [40], [[2, 1]])))
    stored = layout.tokens(layout.write(pages, k, v, rows), np.array([2, 1]), 40)
    for got, want in zip(stored, (k, v), strict=True):
        tolerance = {"float32": 0, "bfloat16": 0.02, "int8": 0.03, "float8_e4m3fn": 0.01}[dtype]
        relative = 2**-4 if dtype == "float8_e4m3fn" else 0  # 3 bits behind the first one
        np.testing.assert_allclose(got.astype(np.float32), want, atol=tolerance, rtol=relative)
