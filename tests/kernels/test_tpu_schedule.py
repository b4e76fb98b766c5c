"""What the TPU kernel's inner loops cost, by libtpu's own schedule of them."""

from __future__ import annotations

import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.topology import is_installed
from kernels.paged_attention.tpu_schedule import clock_hz, dma_cycles, measured_apart


@pytest.mark.parametrize(
    ("chip", "cores", "gigahertz", "cycles"),
    [("V4", 2, 1.05, 3590), ("V5E", 1, 1.5, 3840), ("V5P", 2, 1.75, 2990), ("V6E", 1, 1.75, 2240)],
)
def test_cycles_of_a_copy_are_by_the_clock_and_the_bandwidth_of_one_core(chip, cores, gigahertz, cycles):
    """Of 512 tokens with 8 KV heads of 128 in bfloat16."""
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[f"TPU_{chip}"], cores)
    assert clock_hz(info) == pytest.approx(gigahertz * 1e9, rel=0.01)
    assert dma_cycles(info, 512 * 8 * 2 * 128 * 2) == pytest.approx(cycles, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason="libtpu is absent: install the extra tpu-compile")
@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
def test_memory_bounds_decodes_and_groups_share_their_prefix(chip):
    loops = {row.path: row for row in measured_apart(chip, "Llama-3.1-8B")}
    assert loops["decode"].spills == 0
    assert loops["decode"].of_dma <= 0.9
    assert loops["group"].bundles_per_query <= loops["decode"].bundles_per_query / 4
    assert loops["prefill"].mxu_share >= 0.4
    assert loops["decode"].bundles_per_kv_token < loops["jax"].bundles_per_kv_token
