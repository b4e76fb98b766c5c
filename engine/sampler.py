"""Draws one token a row from logits, on the device. Axes: `L` rows of logits, `V` vocabulary.

What no row of a step asks for is skipped at run time (`lax.cond`), so one compiled step serves all of it.

The draw itself is `kernels.sampling.draw`: an argmax of filtered logits plus Gumbel noise, whose key is made
of the row's identity and the token's position, so nothing else in the batch can reach it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS
from kernels.row_sums import row_sums
from kernels.sampling import Draws, draw

_REMOVED = -jnp.inf


class SamplingInputs(NamedTuple):
    """What each row of logits is drawn with; rows past the step's own are greedy and ignored."""

    temperature: jax.Array  # f32[L], 0 is greedy
    top_k: jax.Array  # i32[L], V when off
    top_p: jax.Array  # f32[L]
    min_p: jax.Array  # f32[L]
    keys: jax.Array  # u32[L, 2], the identity's key
    positions: jax.Array  # i32[L], the drawn token's position in its sequence
    num_rows: jax.Array  # i32[], rows of logits that the step has; those past them are padding
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


def sample(logits: jax.Array, inputs: SamplingInputs, backend: str = "xla") -> StepOutputs:
    """Draw from f32[L, V], by one of the backends of `kernels.sampling`.

    Order, as vLLM's: bias, penalties, mask, then (rows with a temperature) temperature, min_p, top_k,
    top_p. Log-probabilities are of the logits as the model gave them.
    """
    draws = Draws(inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.keys, inputs.positions)

    def draw_from(logits: jax.Array) -> jax.Array:
        return draw(logits, draws, inputs.num_rows, backend)

    # The draw is inside both branches: one that gave its logits back would copy tens of megabytes a step.
    is_changed = inputs.any_bias | inputs.any_penalty | inputs.any_mask
    token_ids = jax.lax.cond(is_changed, lambda x: draw_from(_changed(x, inputs)), draw_from, logits)
    token_ids = jnp.where(inputs.has_target, inputs.targets, token_ids)
    return jax.lax.cond(inputs.any_logprobs, _with_logprobs, _without_logprobs, logits, token_ids)


def _changed(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """The logits that rows with biases, penalties or masks draw from; those of other rows as they are."""
    changed = jax.lax.cond(inputs.any_bias, _add_bias, lambda x, _: x, logits, inputs)
    changed = jax.lax.cond(inputs.any_penalty, _penalise, lambda x, _: x, changed, inputs)
    return jax.lax.cond(inputs.any_mask, _mask, lambda x, _: x, changed, inputs)


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
