"""A mixture of experts in the place of an MLP (Shazeer et al. 2017, arXiv:1701.06538), routed as Mixtral is
(Jiang et al. 2024, arXiv:2401.04088): each token goes through the experts with the highest router logits, and
what they make is added, weighted by the softmax of those logits.

A step puts its tokens in the order of their experts and multiplies them in tiles of one expert each, so
that what is computed is what was chosen, up to a tile an expert. On a mesh each chip of the ep axis has some
of the experts, and what the chips make is added.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from engine.models.config import ModelConfig
from engine.models.linear import Linear
from kernels.linear import PackedWeight, gated_linear, linear

if TYPE_CHECKING:
    from engine.models.llama import RMSNorm

# Rows of one product: enough to be worth reading an expert's weights for, few enough to waste little.
_TILE = 64


class SplitAxes(NamedTuple):
    """The axes of a mesh that a layer is split over."""

    tensor: str
    expert: str
    num_expert_chips: int


class Expert(nnx.Module):
    """SwiGLU without what is around it; the rows of `gate_up` are the gate's, then the up's."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        inner = config.intermediate_size
        self.gate_up = Linear(config.d_model, 2 * inner, use_bias=False, dtype=dtype)
        self.down = Linear(inner, config.d_model, use_bias=False, dtype=dtype)


class Mixture(nnx.Module):
    """`experts` holds all of them; of packed weights one, whose arrays are those of all that a chip has."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, axes: SplitAxes | None, is_packed: bool):
        self.router = Linear(config.d_model, config.num_experts, use_bias=False, dtype=dtype)
        self.experts = nnx.List(
            [Expert(config, dtype) for _ in range(1 if is_packed else config.num_experts)]
        )
        self.num_chosen = config.experts_per_token
        self.num_held = config.num_experts // (axes.num_expert_chips if axes else 1)
        self.axes = axes

    def __call__(self, x: jax.Array, norm: RMSNorm, num_rows: jax.Array | None = None) -> jax.Array:
        """The stream [T, D] -> the stream with what the experts make of it, normalised, added."""
        hidden = norm(x)
        logits = self.router(hidden.astype(jnp.float32), num_rows=num_rows)
        top, chosen = jax.lax.top_k(logits, self.num_chosen)
        weights = jax.nn.softmax(top, axis=-1)
        gate_up = self.experts[0].gate_up.weight.get_value()
        if isinstance(gate_up, PackedWeight):
            made = self._packed(hidden, chosen, gate_up, num_rows)
        else:
            made = self._plain(hidden, chosen)
        total = jnp.zeros(x.shape, jnp.float32)
        for place in range(self.num_chosen):  # in one order, whatever else is in the step
            total = total + weights[:, place, None] * made[:, place].astype(jnp.float32)
        total = total.astype(x.dtype)
        if self.axes is not None:
            total = jax.lax.psum(total, (self.axes.expert, self.axes.tensor))
        return x + total

    def _plain(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        """What each token's experts make of it, [T, k, D], by making what all would."""
        every = []
        for expert in self.experts:
            gate, up = jnp.split(expert.gate_up(x), 2, axis=-1)
            every.append(expert.down(jax.nn.silu(gate) * up))
        return jnp.take_along_axis(jnp.stack(every, 1), chosen[:, :, None], axis=1)

    def _packed(
        self, x: jax.Array, chosen: jax.Array, gate_up: PackedWeight, num_rows: jax.Array | None
    ) -> jax.Array:
        """The same by tiles of rows that chose one expert; zero for experts that are on other chips."""
        down: Any = self.experts[0].down.weight.get_value()
        num_tokens, k = chosen.shape
        first = 0 if self.axes is None else jax.lax.axis_index(self.axes.expert) * self.num_held
        here = chosen - first
        is_here = (here >= 0) & (here < self.num_held)
        if num_rows is not None:
            is_here &= (jnp.arange(num_tokens) < num_rows)[:, None]
        expert_of = jnp.where(is_here, here, self.num_held).reshape(-1)
        order = jnp.argsort(expert_of, stable=True)
        rows = jnp.pad(x[order // k], ((0, _TILE), (0, 0)))
        counts = jnp.sum(expert_of[:, None] == jnp.arange(self.num_held), axis=0, dtype=jnp.int32)
        starts = jnp.cumsum(counts) - counts
        tiles = -(-counts // _TILE)
        tiles_end = jnp.cumsum(tiles)

        def one_tile(tile: jax.Array, out: jax.Array) -> jax.Array:
            expert = jnp.sum(tiles_end <= tile, dtype=jnp.int32)
            offset = (tile - (tiles_end[expert] - tiles[expert])) * _TILE
            count = jnp.minimum(counts[expert] - offset, _TILE)
            start = starts[expert] + offset
            part = jax.lax.dynamic_slice_in_dim(rows, start, _TILE)
            part = gated_linear(part, replace(gate_up, index=gate_up.index + expert), None, count)
            part = linear(part, replace(down, index=down.index + expert), None, count)
            before = jax.lax.dynamic_slice_in_dim(out, start, _TILE)
            is_mine = (jnp.arange(_TILE) < count)[:, None]
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(is_mine, part, before), start, 0)

        out = jax.lax.fori_loop(jnp.int32(0), tiles_end[-1], one_tile, jnp.zeros_like(rows))
        made = out[jnp.argsort(order)].reshape(num_tokens, k, -1)
        return jnp.where(is_here[:, :, None], made, jnp.zeros_like(made))
