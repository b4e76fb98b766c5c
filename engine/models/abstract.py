"""A packed model with shapes in the place of arrays, and a chip's share of it: to compile for, and to count.

Nothing is allocated, so a laptop can look at a model of any size.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from engine.models.config import ModelConfig
from engine.models.llama import abstract_llama
from engine.models.packed import PackedModel, head_format_of, head_is_embedding
from engine.models.tensor_split import TensorSplit
from kernels.linear import PackedWeights, abstract_weights


def abstract_model(config: ModelConfig, weight_format: str, backend: str, dtype: str) -> PackedModel:
    """What `pack_model` makes of a model of `config` that was loaded as `dtype`."""
    model = abstract_llama(replace(config, num_layers=1), jnp.dtype(dtype))
    layer = model.layers[0]
    layers: dict[str, PackedWeights | jax.Array] = {}
    for path, variable in dict(nnx.to_flat_state(nnx.state(layer))).items():
        name, array = ".".join(map(str, path)), variable.get_value()
        if len(array.shape) == 2:
            rows, in_dim = array.shape
            layers[name] = abstract_weights(
                rows, in_dim, config.num_layers, weight_format, backend, is_gated="gate_up" in path
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


def _shape(dims: tuple[int, ...], dtype: object) -> jax.Array:
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))  # type: ignore[return-value]


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
