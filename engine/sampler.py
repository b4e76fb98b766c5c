"""Draws one token a row from logits, on the device. Axes: `L` rows of logits, `V` vocabulary.

What no row of a step asks for is skipped at run time (`lax.cond`), so one compiled step serves all of
it: a step of greedy rows costs an argmax.

A row's draw is the argmax of its filtered logits plus Gumbel noise, whose key is made of the row's
identity and the token's position: nothing else in the batch can reach it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engine.models.linear import row_sums
from engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS

_REMOVED = -jnp.inf


class SamplingInputs(NamedTuple):
    """What each row of logits is drawn with; rows past the step's own are greedy and ignored."""

    temperature: jax.Array  # f32[L], 0 is greedy
    top_k: jax.Array  # i32[L], V when off
    top_p: jax.Array  # f32[L]
    min_p: jax.Array  # f32[L]
    keys: jax.Array  # u32[L, 2], the identity's key
    positions: jax.Array  # i32[L], the drawn token's position in its sequence
    repetition_penalty: jax.Array  # f32[L]
    presence_penalty: jax.Array  # f32[L]
    frequency_penalty: jax.Array  # f32[L]
    history: jax.Array  # i32[L, max_model_len], prompt and output tokens, for rows with penalties
    prompt_len: jax.Array  # i32[L]
    history_len: jax.Array  # i32[L]
    token_mask: jax.Array  # u32[L, ceil(V / 32)], bit set: may be drawn
    bias_ids: jax.Array  # i32[L, MAX_LOGIT_BIAS], V where unused
    bias_values: jax.Array  # f32[L, MAX_LOGIT_BIAS]
    targets: jax.Array  # i32[L], the token whose log-probability is wanted where `has_target`
    has_target: jax.Array  # bool[L]: a prompt position, whose next token is known
    any_random: jax.Array  # bool[]: some row has a temperature
    any_filter: jax.Array  # bool[]: some row has top_k, top_p or min_p
    any_penalty: jax.Array  # bool[]
    any_mask: jax.Array  # bool[]
    any_bias: jax.Array  # bool[]
    any_logprobs: jax.Array  # bool[]


class StepOutputs(NamedTuple):
    """A step's results, one a row of logits."""

    token_ids: jax.Array  # i32[L]: drawn, or the target
    logprobs: jax.Array  # f32[L], of `token_ids` under the unchanged logits; 0 unless `any_logprobs`
    top_ids: jax.Array  # i32[L, MAX_LOGPROBS], likeliest first
    top_logprobs: jax.Array  # f32[L, MAX_LOGPROBS]


def sample(logits: jax.Array, inputs: SamplingInputs) -> StepOutputs:
    """Draw from f32[L, V].

    Order, as vLLM's: bias, penalties, mask, then (rows with a temperature) temperature, min_p, top_k,
    top_p. Log-probabilities are of the logits as the model gave them.
    """
    changed = jax.lax.cond(inputs.any_bias, _add_bias, lambda x, _: x, logits, inputs)
    changed = jax.lax.cond(inputs.any_penalty, _penalise, lambda x, _: x, changed, inputs)
    changed = jax.lax.cond(inputs.any_mask, _mask, lambda x, _: x, changed, inputs)
    greedy = jnp.argmax(changed, axis=-1).astype(jnp.int32)
    drawn = jax.lax.cond(inputs.any_random, _draw, lambda x, _: greedy, changed, inputs)
    token_ids = jnp.where(inputs.temperature > 0, drawn, greedy)
    token_ids = jnp.where(inputs.has_target, inputs.targets, token_ids)
    return jax.lax.cond(inputs.any_logprobs, _with_logprobs, _without_logprobs, logits, token_ids)


def _add_bias(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, inputs.bias_ids].add(inputs.bias_values, mode="drop")


def _penalise(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Repetition over prompt and output (Keskar et al. 2019), presence and frequency over output (OpenAI)."""
    num_rows, vocab_size = logits.shape
    rows = jnp.arange(num_rows)[:, None]
    position = jnp.arange(inputs.history.shape[1])[None, :]
    held = position < inputs.history_len[:, None]
    generated = held & (position >= inputs.prompt_len[:, None])
    empty = jnp.zeros((num_rows, vocab_size), jnp.float32)
    known = jnp.where(held, inputs.history, vocab_size)
    seen = empty.at[rows, known].add(1.0, mode="drop") > 0
    made = jnp.where(generated, inputs.history, vocab_size)
    counts = empty.at[rows, made].add(1.0, mode="drop")
    penalty = inputs.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    # Exactly the logit where there is no penalty: a greedy row in the same step must not move.
    logits = jnp.where(seen & (penalty != 1.0), repeated, logits)
    logits = logits - inputs.frequency_penalty[:, None] * counts
    return logits - inputs.presence_penalty[:, None] * (counts > 0).astype(logits.dtype)


def _mask(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    tokens = jnp.arange(logits.shape[1], dtype=jnp.uint32)[None, :]
    words = jnp.repeat(inputs.token_mask, 32, axis=1)[:, : logits.shape[1]]
    return jnp.where((words >> (tokens % 32)) & 1 > 0, logits, _REMOVED)


def _draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """i32[L]; meaningless for greedy rows."""
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)
    # The likeliest becomes 0, so that no temperature can overflow it and thresholds are relative.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]
    scaled = jax.lax.cond(inputs.any_filter, _filter, lambda x, _: x, scaled, inputs)

    def noise(key: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (logits.shape[1],), jnp.float32)

    gumbel = jax.vmap(noise)(inputs.keys, inputs.positions)
    return jnp.argmax(scaled + gumbel, axis=-1).astype(jnp.int32)


def _filter(scaled: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Remove what min_p, then top_k, then top_p leave out; tokens as likely as the last one kept are kept.

    Each is a threshold on the logits. Those of top_k and top_p are found by bisection over the floats'
    bits, which takes 32 passes and no sort (a sort of V values costs several times that on a CPU).
    """
    kept = scaled >= jnp.log(inputs.min_p)[:, None]
    scaled = jnp.where(kept, scaled, _REMOVED)
    order = _orderable(scaled)

    def enough_tokens(threshold: jax.Array) -> jax.Array:
        return jnp.sum(order >= threshold[:, None], axis=-1, dtype=jnp.int32) >= inputs.top_k

    order = jnp.where(order >= _largest(enough_tokens, scaled.shape[0])[:, None], order, 0)
    weights = jnp.where(order > 0, jnp.exp(scaled), 0.0)
    wanted = inputs.top_p * row_sums(weights)[:, 0]

    def enough_mass(threshold: jax.Array) -> jax.Array:
        return row_sums(jnp.where(order >= threshold[:, None], weights, 0.0))[:, 0] >= wanted

    threshold = _largest(enough_mass, scaled.shape[0])
    # Off must mean off: rounding could make the last sum miss the whole by a bit.
    threshold = jnp.where(inputs.top_p < 1.0, threshold, 1)
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


def _with_logprobs(logits: jax.Array, token_ids: jax.Array) -> StepOutputs:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normaliser = jnp.log(row_sums(jnp.exp(shifted)))
    chosen = jnp.take_along_axis(shifted, token_ids[:, None], axis=-1)
    num_top = min(MAX_LOGPROBS, logits.shape[1])
    top, top_ids = jax.lax.top_k(shifted, num_top)
    spare = [(0, 0), (0, MAX_LOGPROBS - num_top)]
    return StepOutputs(
        token_ids,
        (chosen - normaliser)[:, 0],
        jnp.pad(top_ids.astype(jnp.int32), spare),
        jnp.pad(top - normaliser, spare, constant_values=_REMOVED),
    )


def _without_logprobs(logits: jax.Array, token_ids: jax.Array) -> StepOutputs:
    num_rows = logits.shape[0]
    return StepOutputs(
        token_ids,
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros((num_rows, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((num_rows, MAX_LOGPROBS), jnp.float32),
    )


__all__ = ["MAX_LOGIT_BIAS", "MAX_LOGPROBS", "SamplingInputs", "StepOutputs", "sample"]
