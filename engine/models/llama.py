"""The Llama architecture (Touvron et al. 2023, arXiv:2302.13971; grouped queries: arXiv:2305.13245).

The model knows nothing of pages: attention is the `attend` it is called with, which writes this step's keys
and values and attends over everything the sequence holds. A step runs the same layers over packed weights,
in a loop (`engine.models.packed`); `Llama.__call__` unrolls them over plain arrays.

A model is built abstractly (`abstract_llama`, no memory) and filled tensor by tensor by the loader, which
follows `weight_plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engine.models.config import ModelConfig
from engine.models.linear import Linear, project
from engine.models.mixture import Mixture, SplitAxes
from engine.models.rope import apply_rope, rope_tables
from kernels.row_sums import row_sums

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(q [T, N, H], k [T, K, H], v [T, K, H], one layer's pages) -> (out [T, N, H], the pages with k, v written).

q and k come rotated and unscaled: the scale is `attention_scale(config)`.
"""


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467), computed in f32."""

    def __init__(self, dim: int, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(row_sums(wide * wide) / x.shape[-1] + self.eps)
        return (wide * inverse * self.weight[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; one product makes queries, keys and values (rows of `qkv` in that order)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, tensor_axis: str | None = None):
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.attention_bias
        self.qkv = Linear(config.d_model, (heads + 2 * kv_heads) * head_dim, use_bias=bias, dtype=dtype)
        self.out = Linear(heads * head_dim, config.d_model, use_bias=bias, dtype=dtype, sum_axis=tensor_axis)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    def split(
        self, qkv: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The product [T, (N + 2 K) H] -> q [T, N, H] and k [T, K, H], rotated, and v [T, K, H]."""
        num_rotated = self.heads + self.kv_heads
        qkv = qkv.reshape(qkv.shape[0], num_rotated + self.kv_heads, self.head_dim)
        rotated = apply_rope(qkv[:, :num_rotated], *rope)
        return rotated[:, : self.heads], rotated[:, self.heads :], qkv[:, num_rotated:]


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202); one product makes gate and up (its rows, so ordered)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, tensor_axis: str | None = None):
        inner, bias = config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(config.d_model, 2 * inner, use_bias=bias, dtype=dtype)
        self.down = Linear(inner, config.d_model, use_bias=bias, dtype=dtype, sum_axis=tensor_axis)

    def __call__(self, x: jax.Array, norm: RMSNorm, num_rows: jax.Array | None = None) -> jax.Array:
        """The stream [T, D] -> the stream with what the MLP makes of it, normalised, added."""
        hidden = self.gate_up.gated(x, norm=norm, num_rows=num_rows)
        return self.down(hidden, residual=x, num_rows=num_rows)


class Layer(nnx.Module):
    """Attention, then the MLP or a mixture of experts, each on the normalised stream and added to it.

    axes: the mesh axes whose chips share the layer: `config` then counts one chip's heads and inner units,
        and what the chips make is added.
    is_packed: for packed weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        axes: SplitAxes | None = None,
        is_packed: bool = False,
    ):
        tensor_axis = None if axes is None else axes.tensor
        self.attention_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.attention = Attention(config, dtype, tensor_axis)
        self.mlp_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.mlp = (
            Mixture(config, dtype, axes, is_packed) if config.num_experts else MLP(config, dtype, tensor_axis)
        )

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        layer_pages: Any,
        attend: Attend,
        num_rows: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The stream [T, D] -> (the stream after this layer, the pages). Rows past `num_rows` are padding."""
        attended, layer_pages = self.attended(x, rope, layer_pages, attend, num_rows)
        return self.rest(x, attended, num_rows), layer_pages

    def attended(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        layer_pages: Any,
        attend: Attend,
        num_rows: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The stream [T, D] -> (what attention makes of it [T, N * H], the pages)."""
        attention = self.attention
        qkv = attention.qkv(x, norm=self.attention_norm, num_rows=num_rows)
        attended, layer_pages = attend(*attention.split(qkv, rope), layer_pages)
        return attended.reshape(x.shape[0], -1), layer_pages

    def rest(self, x: jax.Array, attended: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """What follows, for each row by itself: the stream [T, D] that `attended` [T, N * H] was made of ->
        the stream after this layer."""
        x = self.attention.out(attended, residual=x, num_rows=num_rows)
        return self.mlp(x, self.mlp_norm, num_rows)


class Llama(nnx.Module):
    """A decoder over one flat step of T tokens, of however many sequences."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.embed = nnx.Param(jnp.zeros((config.vocab_size, config.d_model), dtype))
        self.layers = nnx.List([Layer(config, dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.head = (
            None
            if config.tie_word_embeddings
            else Linear(config.d_model, config.vocab_size, use_bias=False, dtype=dtype)
        )

    def __call__(
        self, token_ids: jax.Array, positions: jax.Array, kv_pages: tuple[Any, ...], attend: Attend
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Tokens and positions i32[T], pages by layer -> (hidden [T, D] after the last norm, pages)."""
        x = self.embedded(token_ids)
        rope = rope_tables(self.config, positions)
        written = []
        for layer, layer_pages in zip(self.layers, kv_pages, strict=True):
            x, layer_pages = layer(x, rope, layer_pages, attend)
            written.append(layer_pages)
        return self.norm(x), tuple(written)

    def embedded(self, token_ids: jax.Array) -> jax.Array:
        """i32[T] -> [T, D], what goes into the first layer."""
        return self.embed[...].at[token_ids].get(mode="clip")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [S, D] (as `__call__` returns it) -> f32[S, V]."""
        return project(hidden, self.embed[...] if self.head is None else self.head.weight[...])


def abstract_llama(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Llama:
    """The model with shapes in the place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: Llama(config, dtype))


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One tensor of a checkpoint, by its Hugging Face name, and the shape it must have."""

    name: str
    shape: tuple[int, ...]
    optional: bool = False
    """A bias that may be absent, and is then zero (some files bias q, k, v only)."""
    rotary_heads: int | None = None
    """For q and k: how many heads its rows hold, which a GGUF reader needs to reorder them."""


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """One array of the model, at `path` in its nnx state: the rows of `parts`, one after the other."""

    path: tuple[str | int, ...]
    parts: tuple[WeightPart, ...]


def weight_plan(config: ModelConfig) -> Iterator[WeightTarget]:
    """Every array of the model and the checkpoint tensors it is made of, in layer order and lazily.

    Lazily, so that a hostile layer count fails at the first tensor the file does not have.
    """
    d_model, inner, vocab = config.d_model, config.intermediate_size, config.vocab_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield WeightTarget(("embed",), (WeightPart("model.embed_tokens.weight", (vocab, d_model)),))
    yield WeightTarget(("norm", "weight"), (WeightPart("model.norm.weight", (d_model,)),))
    if not config.tie_word_embeddings:
        yield WeightTarget(("head", "weight"), (WeightPart("lm_head.weight", (vocab, d_model)),))
    for index in range(config.num_layers):
        here, at = f"model.layers.{index}.", ("layers", index)
        products: dict[tuple[str | int, ...], Any] = {
            ("attention", "qkv"): (
                ("self_attn.q_proj", q_rows, d_model, config.num_heads),
                ("self_attn.k_proj", kv_rows, d_model, config.num_kv_heads),
                ("self_attn.v_proj", kv_rows, d_model, None),
            ),
            ("attention", "out"): (("self_attn.o_proj", d_model, q_rows, None),),
        }
        if config.num_experts:
            products |= _expert_products(config)
        else:
            products["mlp", "gate_up"] = (
                ("mlp.gate_proj", inner, d_model, None),
                ("mlp.up_proj", inner, d_model, None),
            )
            products["mlp", "down"] = (("mlp.down_proj", d_model, inner, None),)
        for path, parts in products.items():
            yield WeightTarget(
                (*at, *path, "weight"),
                tuple(
                    WeightPart(f"{here}{name}.weight", (rows, columns), rotary_heads=heads)
                    for name, rows, columns, heads in parts
                ),
            )
            if config.attention_bias if path[0] == "attention" else config.mlp_bias:
                yield WeightTarget(
                    (*at, *path, "bias"),
                    tuple(
                        WeightPart(f"{here}{name}.bias", (rows,), optional=True, rotary_heads=heads)
                        for name, rows, _, heads in parts
                    ),
                )
        yield WeightTarget(
            (*at, "attention_norm", "weight"), (WeightPart(f"{here}input_layernorm.weight", (d_model,)),)
        )
        yield WeightTarget(
            (*at, "mlp_norm", "weight"), (WeightPart(f"{here}post_attention_layernorm.weight", (d_model,)),)
        )


def _expert_products(config: ModelConfig) -> dict[tuple[str | int, ...], Any]:
    """Those of `weight_plan` in the place of an MLP's, by the names of Mixtral's checkpoints."""
    d_model, inner, mixture = config.d_model, config.intermediate_size, "block_sparse_moe"
    router = ((f"{mixture}.gate", config.num_experts, d_model, None),)
    products: dict[tuple[str | int, ...], Any] = {("mlp", "router"): router}
    for index in range(config.num_experts):
        name, path = f"{mixture}.experts.{index}", ("mlp", "experts", index)
        products[*path, "gate_up"] = tuple((f"{name}.{each}", inner, d_model, None) for each in ("w1", "w3"))
        products[*path, "down"] = ((f"{name}.w2", d_model, inner, None),)
    return products
