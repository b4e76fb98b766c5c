"""A model's weights as a step uses them: packed once for the machine's products, each kind for all layers.

The layers run in one loop whose body is one layer's code (`engine.models.llama.Layer`) over the weights that
the loop's index picks. Unrolled, a step of thirty layers takes XLA twenty times as long to compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from engine.models.config import ModelConfig
from engine.models.llama import Layer, Llama
from engine.models.rope import rope_tables
from kernels.linear import PackedWeight, PackedWeights, linear, pack_weights, weight_rows

AttendLayer = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(layer i32[], q [T, N, H], k [T, K, H], v [T, K, H], pages) -> (out [T, N, H], pages)."""

Path = tuple[str | int, ...]


class Wanted(NamedTuple):
    """The tokens of a step whose logits are asked for."""

    tokens: jax.Array  # i32[L], their places among the step's
    count: jax.Array  # i32[], entries past it are padding

    def of(self, rows: jax.Array) -> jax.Array:
        """Their rows: [T, ...] -> [L, ...]."""
        return rows.at[self.tokens].get(mode="clip")


# The last product is as large as a third of a small model, and its errors go straight into the logits.
_HEAD_FORMATS = {"int4": "int8"}
EXACT_FORMATS = ("float32", "bfloat16")
"""Packing loses nothing of weights that were loaded as this."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "norm", "head", "embed"],
    meta_fields=["config", "layer_graph", "dtype"],
)
@dataclass(frozen=True, slots=True)
class PackedModel:
    """What a step reads of a model. `layers` is keyed by the path of a layer's parameter."""

    layers: dict[str, PackedWeights | jax.Array]
    """Matrices packed, all else stacked [layers, ...]."""
    norm: jax.Array  # f32[D], before the head
    head: PackedWeights
    embed: jax.Array | None
    """[V, D]; None where the head's own rows are the embeddings and nothing was lost in packing them."""
    config: ModelConfig
    layer_graph: nnx.GraphDef
    dtype: str
    """Of activations, whatever the weights are stored as."""

    @property
    def num_bytes(self) -> int:
        """On one device."""
        return bytes_on_device(self)

    def embedded(self, token_ids: jax.Array) -> jax.Array:
        """i32[T] -> [T, D], what goes into the first layer."""
        if self.embed is not None:
            return self.embed.at[token_ids].get(mode="clip")
        return weight_rows(self.head, token_ids).astype(self.dtype)

    def forward(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        pages: Any,
        attend: AttendLayer,
        num_tokens: jax.Array | None = None,
        wanted: Wanted | None = None,
    ) -> tuple[jax.Array, Any]:
        """What `Llama.__call__` computes before its last norm, with the layer's number given to `attend`.

        Only attention looks at other tokens, so behind that of the last layer those that nobody asks for are
        left out: of a long prompt all but one.

        Args:
            token_ids, positions: i32[T].
            num_tokens: i32[], tokens past it are padding, and whatever comes out of them.
            wanted: which tokens' hidden states are asked for (default: all T).

        Returns:
            (hidden [L or T, D], pages).
        """
        rope = rope_tables(self.config, positions)

        def run_layer(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            x, pages = carry
            return self._layer(index)(x, rope, pages, partial(attend, index), num_tokens)

        leaves_out = wanted is not None and len(wanted.tokens) < len(token_ids)
        last = jnp.int32(self.config.num_layers - leaves_out)
        x, pages = jax.lax.fori_loop(jnp.int32(0), last, run_layer, (self.embedded(token_ids), pages))
        if wanted is None:
            return x, pages
        if not leaves_out:
            return wanted.of(x), pages
        layer = self._layer(last)
        attended, pages = layer.attended(x, rope, pages, partial(attend, last), num_tokens)
        return layer.rest(wanted.of(x), wanted.of(attended), wanted.count), pages

    def logits(self, hidden: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """hidden [L, D], as `forward` returns it -> f32[L, V]; rows past `num_rows` are unspecified."""
        norm = (self.norm, self.config.rms_norm_eps)
        return linear(hidden, self.head.layer(0), num_rows=num_rows, norm=norm, out_dtype=jnp.float32)

    def _layer(self, index: jax.Array) -> Layer:
        def pick(weights: PackedWeights | jax.Array) -> PackedWeight | jax.Array:
            if isinstance(weights, jax.Array):
                return weights[index]
            num_each = weights.meta.num_layers // self.config.num_layers  # the experts of a layer, or 1
            return weights.layer(index if num_each == 1 else index * num_each)

        state = [(_path_of(name), nnx.Param(pick(w))) for name, w in self.layers.items()]
        return nnx.merge(self.layer_graph, nnx.from_flat_state(state))


def pack_model(model: Llama, weight_format: str, backend: str, *, takes_weights: bool = False) -> PackedModel:
    """Pack a model's weights for `kernels.linear`.

    weight_format: what the matrices are stored as ("float32", "bfloat16", "int8", "int4"); norms and biases
        stay as they are, the embeddings too if the head is quantised.
    takes_weights: each matrix of `model` is deleted once it is packed, so that no two copies of a model are
        ever held; the model is of no use afterwards.
    """
    config = model.config
    dtype = str(model.embed.dtype)  # before its array is deleted
    flat = [dict(nnx.to_flat_state(nnx.state(layer))) for layer in model.layers]
    graph = nnx.graphdef(model.layers[0])
    paths: list[Any] = list(flat[0])
    if config.num_experts:
        template = nnx.eval_shape(lambda: Layer(config, jnp.dtype(dtype), is_packed=True))
        graph, paths = nnx.graphdef(template), [path for path, _ in nnx.to_flat_state(nnx.state(template))]
    layers: dict[str, PackedWeights | jax.Array] = {}
    for path in paths:
        name = ".".join(map(str, path))
        arrays = [variables[each].get_value() for variables in flat for each in every_expert(path, config)]
        if arrays[0].ndim == 2:
            matrices = _Matrices(arrays, takes_weights and backend == "cpu")
            stored_as = dtype if "router" in path else weight_format
            layers[name] = pack_weights(matrices, stored_as, backend, is_gated="gate_up" in path)
        else:
            layers[name] = jnp.stack(arrays)
    is_tied = model.head is None
    head = model.embed if model.head is None else model.head.weight
    stored_as = head_format_of(weight_format)
    is_embed_kept = not head_is_embedding(config, stored_as)
    matrices = _Matrices(
        [head.get_value()], takes_weights and backend == "cpu" and not (is_tied and is_embed_kept)
    )
    return PackedModel(
        layers=layers,
        norm=model.norm.weight.get_value(),
        head=pack_weights(matrices, stored_as, backend),
        embed=model.embed.get_value() if is_embed_kept else None,
        config=config,
        layer_graph=graph,
        dtype=dtype,
    )


def every_expert(path: Path, config: ModelConfig) -> list[Path]:
    """The paths of a layer's arrays that are packed together: those of all experts for one of the first's."""
    if "experts" not in path:
        return [path]
    at = path.index("experts") + 1
    return [(*path[:at], index, *path[at + 1 :]) for index in range(config.num_experts)]


def bytes_on_device(tree: Any) -> int:
    """What one device has of arrays, or of their shapes, spread or not."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _path_of(name: str) -> Path:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def head_format_of(weight_format: str) -> str:
    """What the head is stored as where the layers' matrices are stored as `weight_format`."""
    return _HEAD_FORMATS.get(weight_format, weight_format)


def head_is_embedding(config: ModelConfig, head_format: str) -> bool:
    """Whether the head's rows serve as the embeddings: they are the same, and packing loses nothing."""
    return config.tie_word_embeddings and head_format in EXACT_FORMATS


class _Matrices(Sequence):
    """Matrices that are read once each, in order; deleted behind the reader if they are its own."""

    def __init__(self, matrices: list[jax.Array], deletes: bool):
        self._matrices = matrices
        self._deletes = deletes

    def __len__(self) -> int:
        return len(self._matrices)

    def __getitem__(self, index: Any) -> Any:
        return self._matrices[index]

    def __iter__(self) -> Iterator[jax.Array]:
        for matrix in self._matrices:
            yield matrix
            if self._deletes:
                matrix.delete()
