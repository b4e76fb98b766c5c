"""A model's layers as one loop, so that attention is compiled once and not once a layer.

Unrolled, a step of 30 layers takes XLA 20 times as long to compile, nearly all of it for the 30 copies of
attention. In the loop, what differs between layers (their weights) is chosen by a switch over the layers'
own arrays. Stacking the weights and slicing a layer out would copy it, every step, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from engine.models.llama import Llama
from engine.models.rope import rope_tables

AttendLayer = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(layer i32[], q [T, N, H], k [T, K, H], v [T, K, H], pages) -> (out [T, N, H], pages)."""


def looped_forward(
    model: Llama, token_ids: jax.Array, positions: jax.Array, pages: Any, attend: AttendLayer
) -> tuple[jax.Array, Any]:
    """What `model(...)` computes, with all pages in one value and the layer's number given to `attend`.

    token_ids, positions i32[T] -> (hidden [T, D] after the last norm, pages).
    """
    rope = rope_tables(model.config, positions)
    layers = list(model.layers)
    before = [layer.before_attention for layer in layers]
    after = [layer.after_attention for layer in layers]

    def run_layer(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, pages = carry
        q, k, v = layers[0].attention.split(jax.lax.switch(index, before, x), rope)
        attended, pages = attend(index, q, k, v, pages)
        return jax.lax.switch(index, after, x, attended), pages

    start = (model.embedded(token_ids), pages)
    x, pages = jax.lax.fori_loop(jnp.int32(0), jnp.int32(len(layers)), run_layer, start)
    return model.norm(x), pages
