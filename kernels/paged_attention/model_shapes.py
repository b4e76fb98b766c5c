"""The attention of the models that the kernels for TPUs and GPUs are compiled and measured for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels.paged_attention.layout import AttentionOptions, Groups, PageLayout, Rows


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Heads of one chip's share of a model, and what its layers ask of attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(scale=self.head_dim**-0.5, window=self.window)


MODEL_SHAPES = {
    "SmolLM2-135M": ModelShape(9, 3, 64),
    "Llama-3.1-8B": ModelShape(32, 8, 128),
    "Qwen3-8B": ModelShape(32, 8, 128),
    "Gemma-3-12B": ModelShape(16, 8, 256, window=1024),
    "Llama-3.3-70B/8": ModelShape(8, 1, 128),
}
"""The last is one chip's share of eight. Of Gemma the layers with a window, five of six."""


def step_arguments(
    shape: ModelShape,
    layout: PageLayout,
    *,
    num_tokens: int = 512,
    num_slots: int = 64,
    table_width: int = 64,
    num_groups: int = 16,
    num_pages: int = 1024,
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Shapes of a call of `attend`: q, k, v, pages, rows, groups."""
    dtype = jnp.float32 if layout.dtype == jnp.float32 else jnp.bfloat16

    def tokens(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_tokens, heads, shape.head_dim), dtype)

    def numbers(*dims: int) -> Any:
        return jax.ShapeDtypeStruct(dims, jnp.int32)

    rows = Rows(numbers(num_slots + 1), numbers(num_slots), numbers(num_slots, table_width))
    groups = Groups(*(numbers(num_groups) for _ in Groups._fields))
    pages = jax.eval_shape(lambda: layout.empty(num_pages))
    kv = tokens(shape.num_kv_heads)
    return tokens(shape.num_heads), kv, kv, pages, rows, groups
