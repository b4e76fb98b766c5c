"""Drawing tokens in plain XLA: the specification, and what accelerators use.

What no row asks for is skipped at run time (`lax.cond`): a step of greedy rows costs an argmax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.row_sums import row_sums
from kernels.sampling.layout import Draws

_REMOVED = -jnp.inf


def draw(logits: jax.Array, draws: Draws, num_rows: jax.Array) -> jax.Array:
    """See `kernels.sampling.draw`."""
    del num_rows  # a reduction over padding rows costs less than leaving them out
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_random = draws.temperature > 0
    drawn = jax.lax.cond(is_random.any(), _draw, lambda x, _: greedy, logits, draws)
    return jnp.where(is_random, drawn, greedy)


def _draw(logits: jax.Array, draws: Draws) -> jax.Array:
    """i32[L]; meaningless for greedy rows."""
    temperature = jnp.where(draws.temperature > 0, draws.temperature, 1.0)
    # The likeliest becomes 0, so that no temperature can overflow it and thresholds are relative.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]
    filters = (draws.top_k < logits.shape[1]) | (draws.top_p < 1) | (draws.min_p > 0)
    any_filter = (filters & (draws.temperature > 0)).any()
    scaled = jax.lax.cond(any_filter, _filter, lambda x, _: x, scaled, draws)

    def noise(key: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (logits.shape[1],), jnp.float32)

    gumbel = jax.vmap(noise)(draws.keys, draws.positions)
    return jnp.argmax(scaled + gumbel, axis=-1).astype(jnp.int32)


def _filter(scaled: jax.Array, draws: Draws) -> jax.Array:
    """Remove what min_p, then top_k, then top_p leave out; tokens as likely as the last one kept are kept.

    Each is a threshold on the logits. Those of top_k and top_p are found by bisection over the floats'
    bits, which takes 32 passes and no sort (a sort of V values costs several times that on a CPU).
    """
    kept = scaled >= jnp.log(draws.min_p)[:, None]
    scaled = jnp.where(kept, scaled, _REMOVED)
    order = _orderable(scaled)

    def enough_tokens(threshold: jax.Array) -> jax.Array:
        return jnp.sum(order >= threshold[:, None], axis=-1, dtype=jnp.int32) >= draws.top_k

    order = jnp.where(order >= _largest(enough_tokens, scaled.shape[0])[:, None], order, 0)
    weights = jnp.where(order > 0, jnp.exp(scaled), 0.0)
    wanted = draws.top_p * row_sums(weights)[:, 0]

    def enough_mass(threshold: jax.Array) -> jax.Array:
        return row_sums(jnp.where(order >= threshold[:, None], weights, 0.0))[:, 0] >= wanted

    threshold = _largest(enough_mass, scaled.shape[0])
    # Off must mean off: rounding could make the last sum miss the whole by a bit.
    threshold = jnp.where(draws.top_p < 1.0, threshold, 1)
    return jnp.where(order >= threshold[:, None], scaled, _REMOVED)


def _orderable(x: jax.Array) -> jax.Array:
    """uint32 in the order of the floats, and above 0 for every float but negative NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds, num_rows: int) -> jax.Array:
    """uint32[L]: for each row the largest threshold of which `holds` is true, it being true of all below."""

    def try_bit(index: jax.Array, threshold: jax.Array) -> jax.Array:
        trial = threshold | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(holds(trial), trial, threshold)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(num_rows, jnp.uint32))
