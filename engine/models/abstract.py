"""A packed model with shapes in the place of arrays, and a chip's share of it: to compile for, and to count.

Nothing is allocated, so a laptop can look at a model of any size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from engine.mesh import EXPERT_AXIS, TENSOR_AXIS, WEIGHTS_AXIS
from engine.models.config import ModelConfig
from engine.models.llama import Layer
from engine.models.mixture import SplitAxes
from engine.models.packed import PackedModel, head_format_of, head_is_embedding
from engine.models.sharded import GatheredWeights, ShardedModel
from engine.models.tensor_split import TensorSplit
from kernels.linear import PackedWeights, abstract_weights


def abstract_model(
    config: ModelConfig, weight_format: str, backend: str, dtype: str, axes: SplitAxes | None = None
) -> PackedModel:
    """What `pack_model` makes of a model of `config` that was loaded as `dtype`.

    axes: the mesh axes over which a layer is split; `config` then counts one chip's part, but all experts.
    """
    layer = nnx.eval_shape(lambda: Layer(config, jnp.dtype(dtype), axes, is_packed=True))
    num_experts = config.num_experts // (axes.num_expert_chips if axes else 1)
    layers: dict[str, PackedWeights | jax.Array] = {}
    for path, variable in dict(nnx.to_flat_state(nnx.state(layer))).items():
        name, array = ".".join(map(str, path)), variable.get_value()
        if len(array.shape) == 2:
            rows, in_dim = array.shape
            layers[name] = abstract_weights(
                rows,
                in_dim,
                config.num_layers * (num_experts if "experts" in path else 1),
                dtype if "router" in path else weight_format,
                backend,
                is_gated="gate_up" in path,
            )
        else:
            layers[name] = _shape((config.num_layers, *array.shape), array.dtype)
    vocabulary = (config.vocab_size, config.d_model)
    head_format = head_format_of(weight_format)
    is_shared = head_is_embedding(config, head_format)
    return PackedModel(
        layers=layers,
        norm=_shape((config.d_model,), jnp.float32),
        head=abstract_weights(*vocabulary, 1, head_format, backend),
        embed=None if is_shared else _shape(vocabulary, dtype),
        config=config,
        layer_graph=nnx.graphdef(layer),
        dtype=dtype,
    )


def abstract_sharded_model(
    split: TensorSplit, mesh: Mesh | AbstractMesh, backend: str, dtype: str
) -> ShardedModel:
    """What `shard_model` makes, on a mesh whose devices need not be there."""
    local = split.local_config
    axes = SplitAxes(TENSOR_AXIS, EXPERT_AXIS, mesh.shape[EXPERT_AXIS])
    share = share_of(split.config, split.num_chips, split.weight_format)
    chip = abstract_model(share, split.weight_format, backend, dtype, axes)
    embed = chip.embed
    if embed is not None:
        embed = abstract_weights(embed.shape[0], embed.shape[1], 1, dtype, "xla")
    num_experts = local.num_experts // mesh.shape[EXPERT_AXIS]
    return ShardedModel(
        layers={
            name: _on_chips(mesh, part, num_experts if ".experts." in name else 1)
            for name, part in chip.layers.items()
        },
        norm=_on_chips(mesh, chip.norm),
        head=_on_chips(mesh, chip.head),
        embed=None if embed is None else _on_chips(mesh, embed),
        config=local,
        layer_graph=chip.layer_graph,
        dtype=dtype,
        vocab_each=split.vocab_each,
    )


def _on_chips(mesh: Mesh | AbstractMesh, part: PackedWeights | jax.Array, num_each: int = 1) -> Any:
    """The global arrays of which each chip has `part`, its matrices cut for the fsdp axis.

    num_each: matrices of a layer.
    """

    def spread(shape: Any, axes: tuple[str, ...], axis: int = 0, num_cuts: int = 1) -> jax.Array:
        dims = list(shape.shape)
        dims[axis] = -(-dims[axis] // num_cuts)
        dims[0] *= math.prod(mesh.shape[name] for name in axes)
        return _shape(tuple(dims), shape.dtype, NamedSharding(mesh, PartitionSpec(axes)))

    if not isinstance(part, PackedWeights):
        return spread(part, (EXPERT_AXIS, TENSOR_AXIS))
    num_cuts = mesh.shape[WEIGHTS_AXIS]
    axes = (WEIGHTS_AXIS, EXPERT_AXIS, TENSOR_AXIS)
    is_stacked = part.meta.backend == "cpu"  # all matrices in one array, behind one another
    arrays = jax.tree.map(lambda shape: spread(shape, axes, int(is_stacked), num_cuts), part.arrays)
    if num_cuts == 1:
        return PackedWeights(arrays, part.meta)
    sizes = [x.shape[1] for x in part.arrays] if is_stacked else [x.shape[0] for x in part.arrays[0]]
    return GatheredWeights(arrays, part.meta, tuple(sizes), num_each)


def _shape(dims: tuple[int, ...], dtype: object, sharding: NamedSharding | None = None) -> jax.Array:
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=sharding)  # type: ignore[return-value]


def num_parameters(config: ModelConfig) -> int:
    """Numbers in a model's arrays; embeddings that are the head too count once."""
    packed = abstract_model(config, "float32", "xla", "float32")
    return sum(leaf.size for leaf in jax.tree.leaves(packed))


def share_of(config: ModelConfig, num_devices: int, weight_format: str) -> ModelConfig:
    """The part of a model that each of `num_devices` has under tensor parallelism (`TensorSplit`): heads, MLP
    and vocabulary. Special ids are left out: they are those of the whole vocabulary.
    """
    if num_devices == 1:
        return config
    split = TensorSplit(config, num_devices, weight_format)
    return replace(split.local_config, vocab_size=split.vocab_each, bos_token_id=None, eos_token_ids=())
