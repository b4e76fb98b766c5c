"""The online softmax over tiles of keys (Milakov and Gimelshein 2018), in powers of two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.paged_attention.gpu.geometry import Geometry
from kernels.paged_attention.gpu.tokens import KeysAndValues, PagedTokens

# Below any logit, and finite, so that a difference of two of them is a number.
UNSEEN = -1e30
LOG2_E = math.log2(math.e)


class Softmax(NamedTuple):
    """What the rows of a thread block have seen. Its result is `output / total`."""

    maximum: jax.Array  # f32[rows], of log2(e) * logits
    total: jax.Array  # f32[rows], of 2 ** (log2(e) * logit - maximum)
    output: jax.Array  # f32[rows, vector], of the same times values

    @classmethod
    def start(cls, num_rows: int, vector: int, sinks: jax.Array | None = None) -> Softmax:
        """Nothing seen; a sink f32[rows] counts as one key seen whose value is zero."""
        output = jnp.zeros((num_rows, vector), jnp.float32)
        if sinks is None:
            return cls(jnp.full(num_rows, UNSEEN, jnp.float32), jnp.zeros(num_rows, jnp.float32), output)
        return cls(sinks * LOG2_E, jnp.ones(num_rows, jnp.float32), output)

    def add(self, shape: Geometry, q: jax.Array, tile: KeysAndValues, seen: jax.Array | None) -> Softmax:
        """Take in a tile. q: [rows, vector]; seen: [rows, keys], None: all."""
        logits = _product(q, tile.keys, 1)
        if tile.key_scales is not None:
            logits = logits * tile.key_scales[None, :]
        logits = _scaled(shape, logits)
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        maximum = jnp.maximum(self.maximum, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - maximum[:, None])
        decay = jnp.exp2(self.maximum - maximum)
        total = self.total * decay + jnp.sum(weights, axis=1)
        if tile.value_scales is not None:
            weights = weights * tile.value_scales[None, :]
        gained = _product(weights.astype(tile.values.dtype), tile.values, 0)
        return Softmax(maximum, total, self.output * decay[:, None] + gained)

    def merge(self, maximum: jax.Array, output: jax.Array) -> Softmax:
        """Take in a part: its result, and the logarithm of its total (`UNSEEN`: it has seen nothing)."""
        both = jnp.maximum(self.maximum, maximum)
        weight, decay = jnp.exp2(maximum - both), jnp.exp2(self.maximum - both)
        weight = jnp.where(maximum > UNSEEN, weight, 0.0)
        return Softmax(
            both, self.total * decay + weight, self.output * decay[:, None] + output * weight[:, None]
        )

    def result(self) -> jax.Array:
        """f32[rows, vector]; zero where nothing was seen."""
        return self.output / jnp.where(self.total > 0, self.total, 1.0)[:, None]

    def log_total(self) -> jax.Array:
        """f32[rows]: the logarithm to base 2 of the sum of e ** logit; `UNSEEN` where nothing was seen."""
        total = jnp.where(self.total > 0, self.total, 1.0)
        return jnp.where(self.total > 0, self.maximum + jnp.log(total) * LOG2_E, UNSEEN)


def add_tiles(
    state: Softmax,
    q: jax.Array,
    tokens: PagedTokens,
    num_keys: int,
    begin: Any,
    end: Any,
    seen: Callable[[jax.Array], jax.Array] | None = None,
) -> Softmax:
    """Take in the tokens at [begin, end), a tile of `num_keys` at a time.

    seen: of the positions of a tile's keys, i32[1, keys], which of them each row sees, [rows, keys]. None:
        all, and then whole tiles must lie in [begin, end).
    """

    def add(index: Any, state: Softmax) -> Softmax:
        first = begin + index * num_keys
        tile = tokens.read(first, num_keys, None if seen is None else end)
        mask = None
        if seen is not None:
            position = (first + jnp.arange(num_keys, dtype=jnp.int32))[None, :]
            mask = seen(position) & (position < end)
        return state.add(tokens.shape, q, tile, mask)

    num_tiles = jax.lax.div(jnp.maximum(end - begin, 0) + (num_keys - 1), num_keys)
    return jax.lax.fori_loop(0, num_tiles, add, state)


def _product(x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
    """f32, over the last axis of x; float32 operands are not rounded to fewer bits."""
    return jax.lax.dot_general(
        x,
        y,
        (((1,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _scaled(shape: Geometry, products: jax.Array) -> jax.Array:
    """log2(e) times the logits."""
    scale, cap = shape.options.scale, shape.options.soft_cap
    if cap is None:
        return products * (scale * LOG2_E)
    return jnp.tanh(products * (scale / cap)) * (cap * LOG2_E)
