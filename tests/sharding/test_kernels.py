"""Every attention backend runs as it is on a chip's part of the heads, inside `shard_map`."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.paged_attention import AttentionOptions, Groups, Rows, attend, available_backends, page_layout

TOKENS, KV_HEADS, RATIO, DIM, PAGE = 24, 4, 2, 64, 16
BACKENDS = [*available_backends(), pytest.param("pallas_tpu", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_on_several_chips_attend_as_on_one(backend: str):
    pick = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(pick.standard_normal((TOKENS, heads, DIM)), jnp.float32)
        for heads in (KV_HEADS * RATIO, KV_HEADS, KV_HEADS)
    )
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in ([0, 20, 21, 21], [20, 1, 0], [[0, 1], [2, 0], [0, 0]])))
    options, groups = AttentionOptions(scale=DIM**-0.5), Groups.none(3)

    def run(q, k, v, num_kv_heads):
        layout = page_layout(backend, num_kv_heads, DIM, PAGE, "float32")
        return attend(q, k, v, layout.empty(3), rows, groups, options, layout)[0]

    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    heads = P(None, "tp")
    split = jax.shard_map(
        lambda q, k, v: run(q, k, v, KV_HEADS // 4),
        mesh=mesh,
        in_specs=(heads, heads, heads),
        out_specs=heads,
        check_vma=False,
    )
    interpreting = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())
    with interpreting if backend == "pallas_tpu" else nullcontext():
        found = jax.jit(split)(q, k, v)
        wanted = jax.jit(lambda q, k, v: run(q, k, v, KV_HEADS))(q, k, v)
    np.testing.assert_allclose(np.asarray(found)[:21], np.asarray(wanted)[:21], atol=2e-5)
