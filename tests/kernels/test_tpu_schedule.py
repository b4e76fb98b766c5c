"""What the TPU kernel's inner loops cost, by libtpu's own schedule of them."""

from __future__ import annotations

import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.tpu.schedule import read_schedule
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


# As libtpu 0.0.42.1 writes them, much shortened: a loop with two inside, of which the second computes.
BUNDLES = """= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov [#allocation25] }
   0x1 LB: > { %p2_p1 = scmp.lt.s32.totalorder %s3_s4, %s1_s0 }
   0x2 LB: >> { %4 = dma.hbm_to_vmem [thread:$0]  %s5_s1, 128, %s6_s2, %s7_s3 }
   0x3   : >> { %p8_p0 = scmp.ge.s32.totalorder %s9_s5, 8 }
   0x4 LB: >> { %v10_v0 = vld [vmem:[%s11_s9] sm:$0xff] }
   0x5   :  {}
   0x6   : >> { %12 = vst [vmem:[#allocation3_spill]] %v10_v0  ;;  %13 = vmatmul.mubr.bf16.gmra.mxu0 %v10_v0 }
   0x7   : > { %p14_p1 = por %p2_p1, %p8_p0 }
   0x8   :  { %15 = shalt.err (%p14_p1) }
"""
UNITS = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
USE = [[0] * 9 + [1]] * 9
USE[4] = [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]
USE[6] = [2, 0, 0, 0, 0, 0, 0, 1, 1, 0]


def write_schedule(folder, use):
    (folder / "17-ragged.1-72-final_bundles.txt").write_text(BUNDLES)
    rows = [" ".join(map(str, row)) for row in use]
    lines = ["== CAPACITY:", UNITS, "4 3 4 2 1 3 3 1 1 2", "== UTILIZATION:", *rows]
    (folder / "17-ragged.1-73-final_hlo-static-per-bundle-utilization.txt").write_text("\n".join(lines))


def test_a_schedule_is_read_with_its_loops(tmp_path):
    write_schedule(tmp_path, USE)
    schedule = read_schedule(tmp_path, "ragged")
    assert schedule.num_bundles == 9
    assert schedule.capacity["MXU"] == 4
    (outer,) = schedule.loops
    copying, computing = outer.inner
    assert (outer.num_bundles, copying.num_bundles, computing.num_bundles) == (7, 2, 3)
    assert (copying.num_dma, computing.num_dma) == (1, 0)
    assert outer.cycles(copies=4) == 7 + 3 * 2
    assert schedule.matrix_loops() == [computing]
    assert (computing.num_spills, computing.slots_used["MXU"], computing.bundles_used["MXU"]) == (2, 2, 1)


def test_a_schedule_in_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="libtpu wrote no schedule"):
        read_schedule(tmp_path, "ragged")
    write_schedule(tmp_path, USE[1:])
    with pytest.raises(ValueError, match=r"wrote 9 bundles of ragged .* and the use of 8"):
        read_schedule(tmp_path, "ragged")


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
