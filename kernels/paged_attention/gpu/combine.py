"""What decodes have seen in parts, merged by the logarithms of their sums."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.paged_attention.gpu.calling import call_kernel, like
from kernels.paged_attention.gpu.decode import Parts
from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.gpu.plan import Plan
from kernels.paged_attention.gpu.rows import BlockRows
from kernels.paged_attention.gpu.softmax import UNSEEN, Softmax
from kernels.paged_attention.gpu.tokens import vector_index


def combine_parts(
    shape: Geometry, out: jax.Array, parts: tuple[Parts, ...], plan: Plan, sinks: jax.Array | None
) -> jax.Array:
    """`out` [T, N, H] with the tokens of decodes filled in."""
    return call_kernel(
        partial(_kernel, shape),
        out,
        parts,
        plan,
        sinks,
        name="paged_attention_combine",
        grid=(shape.num_kv_heads, shape.num_decodes),
        out_shape=like(out),
        warps=1,
        aliases={0: 0},
    )


def _kernel(shape: Geometry, _: Any, parts: tuple[Parts, ...], plan: Plan, sinks: Any, out: Any) -> None:
    head, decode = pl.program_id(0), pl.program_id(1)
    slot = plan.decode_slot[decode]

    @pl.when(slot < shape.num_slots)
    def _():
        rows = BlockRows(shape, 1 << (shape.ratio - 1).bit_length(), head)
        is_row = rows.query == 0
        state = Softmax.start(rows.num_rows, shape.vector, rows.sinks(sinks, is_row))
        for each in parts:
            state = _merge(rows, each, decode, is_row, state)
        token = jnp.broadcast_to(plan.query_start[slot], is_row.shape)
        rows.store(out, token, is_row, state.result())


def _merge(rows: BlockRows, parts: Any, decode: Any, is_row: jax.Array, state: Softmax) -> Softmax:
    def merge(part: Any, state: Softmax) -> Softmax:
        log_total = plgpu.load(parts.log_total.at[part, decode, rows.query_head], mask=is_row, other=UNSEEN)
        place = (part, decode, rows.query_head[:, None], vector_index(rows.shape))
        has_seen = jnp.broadcast_to((log_total > UNSEEN)[:, None], state.output.shape)
        return state.merge(log_total, plgpu.load(parts.output.at[place], mask=has_seen, other=0.0))

    return jax.lax.fori_loop(0, parts.log_total.shape[0], merge, state)
