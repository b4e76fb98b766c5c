"""What a compiled step is given: all small arrays packed in one, so that a step costs one transfer.

    numbers  [ token_ids | positions | sources | query_start | ... | any_logprobs )   one i32 vector

The host fills numpy views of the vector, the step slices the same fields out of it again. Putting
twenty small arrays on a device costs the host a millisecond, putting one a twentieth of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.sampler import SamplingInputs
from kernels.paged_attention import Groups, Rows


class StepInputs(NamedTuple):
    """Everything a step reads but weights and pages. Padding tokens belong to no slot."""

    token_ids: jax.Array  # i32[T]
    positions: jax.Array  # i32[T]
    rows: Rows
    groups: Groups
    logit_tokens: jax.Array  # i32[L], which token of the step each row of logits is of
    sampling: SamplingInputs


class StepShape(NamedTuple):
    """The sizes of one declared step."""

    num_tokens: int
    num_logits: int
    num_slots: int
    """Sequences a step may have."""
    table_width: int
    """Pages a sequence may have."""
    num_draws: int
    """Tokens the step before may have drawn."""

    @property
    def size(self) -> int:
        """Numbers in the packed vector."""
        return _fields(self)[-1].stop

    def views(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Each field as a view of i32[size] in its own shape."""
        return {
            name: numbers[start:stop] if len(shape) == 1 else numbers[start:stop].reshape(shape)
            for name, start, stop, shape in _fields(self)
        }


class _Field(NamedTuple):
    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


@cache
def _fields(shape: StepShape) -> tuple[_Field, ...]:
    num_tokens, num_logits, num_slots, table_width, _ = shape
    declared: list[tuple[str, tuple[int, ...]]] = [
        ("token_ids", (num_tokens,)),
        ("positions", (num_tokens,)),
        ("sources", (num_tokens,)),
        ("query_start", (num_slots + 1,)),
        ("kv_len", (num_slots,)),
        ("page_table", (num_slots, table_width)),
        ("groups", (4, num_slots)),
        ("logit_tokens", (num_logits,)),
        ("sampled", (len(SAMPLED_COLUMNS), num_logits)),
        ("sample_positions", (num_logits,)),
        ("history_len", (num_logits,)),
        ("targets", (num_logits,)),
        ("has_target", (num_logits,)),
        ("any", (len(ANY_FLAGS),)),
        ("num_logits", (1,)),
    ]
    fields, start = [], 0
    for name, field_shape in declared:
        stop = start + prod(field_shape)
        fields.append(_Field(name, start, stop, field_shape))
        start = stop
    return tuple(fields)


# What a row of logits is drawn with and what stays the same as long as its request runs: one i32 column
# each, floats and unsigned numbers by their bits.
SAMPLED_COLUMNS: dict[str, Any] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "key_low": np.uint32,
    "key_high": np.uint32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "prompt_len": np.int32,
}
ANY_FLAGS = ("any_penalty", "any_mask", "any_bias", "any_logprobs")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepArrays:
    """The argument of a compiled step; `unpack` gives its `StepInputs`, inside the step."""

    numbers: jax.Array | np.ndarray  # i32[shape.size]
    drawn: jax.Array  # i32[num_draws], `StepOutputs.token_ids` of the step before
    history: jax.Array  # these four as in SamplingInputs
    token_mask: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array

    def unpack(self, shape: StepShape) -> StepInputs:
        """The fields, and each row's input token: known to the host, or still where the step before drew it.

        `sources[t]` says which: below num_draws it is an index into `drawn`, else num_draws + t.
        """
        numbers = jnp.asarray(self.numbers)
        parts = {
            field.name: numbers[field.start : field.stop].reshape(field.shape) for field in _fields(shape)
        }
        columns = {
            name: jax.lax.bitcast_convert_type(parts["sampled"][index], dtype)
            for index, (name, dtype) in enumerate(SAMPLED_COLUMNS.items())
        }
        keys = jnp.stack([columns.pop("key_low"), columns.pop("key_high")], axis=1)
        known = jnp.concatenate([self.drawn, parts["token_ids"]])
        sampling = SamplingInputs(
            **columns,
            **{name: parts["any"][index] != 0 for index, name in enumerate(ANY_FLAGS)},
            keys=keys,
            positions=parts["sample_positions"],
            num_rows=parts["num_logits"][0],
            history=self.history,
            history_len=parts["history_len"],
            token_mask=self.token_mask,
            bias_ids=self.bias_ids,
            bias_values=self.bias_values,
            targets=parts["targets"],
            has_target=parts["has_target"] != 0,
        )
        rows = Rows(parts["query_start"], parts["kv_len"], parts["page_table"])
        return StepInputs(
            known[parts["sources"]],
            parts["positions"],
            rows,
            Groups(*parts["groups"]),
            parts["logit_tokens"],
            sampling,
        )
