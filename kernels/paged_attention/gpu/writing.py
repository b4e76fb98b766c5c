"""The step's new keys and values, put into their pages."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.paged_attention.gpu.calling import call_kernel, like
from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.gpu.plan import Plan
from kernels.paged_attention.gpu.tokens import vector_index
from kernels.paged_attention.layout import Pages

_TOKENS = 16  # of one thread block


def write_tokens(shape: Geometry, pages: Pages, new: Pages, plan: Plan) -> Pages:
    """The pages (as `as_rows` makes them) with the step's tokens, in place where they are donated.

    new: keys and values [T, K, H] in the pages' dtype, and their scales f32[T, K] if pages have scales.
    """
    num_arrays = len(jax.tree.leaves(pages))
    return call_kernel(
        partial(_kernel, shape),
        pages,
        new,
        plan,
        name="paged_attention_write",
        grid=(shape.num_kv_heads, -(-shape.num_tokens // _TOKENS)),
        out_shape=jax.tree.map(like, pages),
        warps=4,
        aliases={index: index for index in range(num_arrays)},
    )


def _kernel(shape: Geometry, _: Any, new: Any, plan: Any, pages: Any) -> None:
    head = pl.program_id(0)
    token = pl.program_id(1) * _TOKENS + jnp.arange(_TOKENS, dtype=jnp.int32)
    slot = plgpu.load(plan.token_slot.at[token], mask=token < shape.num_tokens, other=shape.num_slots)
    is_token = slot < shape.num_slots
    position = plgpu.load(plan.token_position.at[token], mask=is_token, other=0)
    size = shape.layout.page_size
    page = plgpu.load(plan.page_table.at[slot, jax.lax.div(position, size)], mask=is_token, other=0)
    row = (page * shape.num_kv_heads + head) * size + jax.lax.rem(position, size)
    # What is masked gets a place past the end: interpreted, it would be written back as it was.
    row = jnp.where(is_token, row, pages.keys.shape[0])
    index = vector_index(shape)
    mask = is_token[:, None] & (index < shape.layout.head_dim)
    for source, target in ((new.keys, pages.keys), (new.values, pages.values)):
        found = plgpu.load(
            source.at[token[:, None], head, index], mask=mask, other=jnp.zeros((), source.dtype)
        )
        plgpu.store(target.at[row[:, None], index], found, mask=mask)
    if shape.layout.has_scales:
        for source, target in ((new.key_scales, pages.key_scales), (new.value_scales, pages.value_scales)):
            found = plgpu.load(source.at[token, head], mask=is_token, other=0.0)
            plgpu.store(target.at[row], found, mask=is_token)
