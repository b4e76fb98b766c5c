"""What the TPU kernel's inner loops cost, by libtpu's own schedule of them."""

from __future__ import annotations

import pytest

from kernels.paged_attention.tpu.topology import is_installed
from kernels.paged_attention.tpu_schedule import measured_apart


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
