"""A packed model with shapes in the place of arrays, and a chip's share of it: to compile for, and to count.

Nothing is allocated, so a laptop can look at a model of any size.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.models.llama import abstract_llama
from engine.models.packed import PackedModel, head_format_of, head_is_embedding
from kernels.linear import PackedWeights, abstract_weights


def abstract_model(config: ModelConfig, weight_format: str, backend: str, dtype: str) -> PackedModel:
    """What `pack_model` makes of a model of `config` that was loaded as `dtype`."""
    model = abstract_llama(replace(config, num_layers=1), jnp.dtype(dtype))
    layer = model.layers[0]
    layers: dict[str, PackedWeights | jax.Array] = {}
    for path, variable in dict(nnx.to_flat_state(nnx.state(layer))).items():
        name, array = ".".join(map(str, path)), variable.get_value()
        if len(array.shape) == 2:
            layers[name] = abstract_weights(
                *array.shape, config.num_layers, weight_format, backend, is_gated="gate_up" in path
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


def share_of(config: ModelConfig, num_devices: int) -> ModelConfig:
    """The part of a model that each of `num_devices` has under tensor parallelism: heads, MLP and vocabulary.

    KV heads are replicated when there are fewer than devices. Special ids are left out: they are those of the
    whole vocabulary. Raises ConfigError, with the numbers that would do, when the model cannot be cut so.
    """
    if num_devices == 1:
        return config
    if not _divides(config, num_devices):
        fitting = [number for number in range(1, config.num_heads + 1) if _divides(config, number)]
        raise ConfigError(
            f"{config.num_heads} query heads, {config.num_kv_heads} KV heads and an MLP of "
            f"{config.intermediate_size} cannot be cut in {num_devices} equal shares: "
            f"{', '.join(map(str, fitting))} devices can share this model"
        )
    return replace(
        config,
        num_heads=config.num_heads // num_devices,
        num_kv_heads=max(1, config.num_kv_heads // num_devices),
        intermediate_size=config.intermediate_size // num_devices,
        vocab_size=-(-config.vocab_size // num_devices),
        bos_token_id=None,
        eos_token_ids=(),
    )


def _divides(config: ModelConfig, number: int) -> bool:
    kv_heads = config.num_kv_heads
    return (
        config.num_heads % number == 0
        and config.intermediate_size % number == 0
        and (kv_heads % number == 0 or number % kv_heads == 0)
    )
