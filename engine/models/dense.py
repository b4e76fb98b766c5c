"""The model without pages: plain causal attention over whole sequences.

The oracle of the tests, not a fast path.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engine.models.config import attention_scale
from engine.models.llama import Llama


def dense_forward(model: Llama, token_ids: Any) -> jax.Array:
    """Logits at every position: token_ids i32[T] or i32[B, T] -> f32[T, V] or f32[B, T, V].

    Position t sees tokens 0..t of its own sequence, so padding on the right changes nothing before it.
    Compiled once a shape.
    """
    graph, weights = nnx.split(model)
    token_ids = jnp.asarray(token_ids, jnp.int32)
    logits = _dense_logits(graph, weights, jnp.atleast_2d(token_ids))
    return logits if token_ids.ndim == 2 else logits[0]


@partial(jax.jit, static_argnums=0)
def _dense_logits(graph: Any, weights: Any, token_ids: jax.Array) -> jax.Array:
    model = nnx.merge(graph, weights)
    config = model.config
    batch, length = token_ids.shape
    visible = jnp.tril(jnp.ones((length, length), bool))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pages: None) -> tuple[jax.Array, None]:
        group = config.num_heads // config.num_kv_heads
        shape = (batch, length, config.num_kv_heads, -1)
        q32 = q.astype(jnp.float32).reshape(batch, length, config.num_kv_heads, group, config.head_dim)
        k32, v32 = k.astype(jnp.float32).reshape(shape), v.astype(jnp.float32).reshape(shape)
        exact = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bqkgh,btkh->bkgqt", q32, k32, precision=exact) * attention_scale(config)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bkgqt,btkh->bqkgh", weights, v32, precision=exact)
        return out.reshape(q.shape).astype(q.dtype), pages

    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    hidden, _ = model(token_ids.reshape(-1), positions, (None,) * config.num_layers, attend)
    return model.logits(hidden).reshape(batch, length, config.vocab_size)
