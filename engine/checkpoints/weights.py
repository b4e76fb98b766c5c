"""Filling a model from a checkpoint, tensor by tensor, so that memory stays near the size of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.llama import Llama, WeightPart, WeightTarget, abstract_llama, weight_plan

DTYPES = ("float32", "bfloat16", "float16")
"""What weights may be loaded as."""


class WeightSource(Protocol):
    """The tensors of a checkpoint, by their Hugging Face names."""

    where: str
    """What an error calls the checkpoint."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, without reading any."""
        ...

    def read_into(self, part: WeightPart, target: np.ndarray) -> None:
        """Write one tensor into `target`, which has its shape and any of `DTYPES`."""
        ...


def check_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of a name in `DTYPES`."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return np.dtype(jnp.dtype(dtype))


def load_weights(config: ModelConfig, source: WeightSource, dtype: str = "float32") -> Llama:
    """Build the model of `config` with the weights of `source`.

    Names and shapes are checked before anything is allocated: a missing tensor, one of another shape, or one
    the architecture has no place for is a ModelError. Norm weights stay float32.
    """
    host_dtype = check_dtype(dtype)
    _check_tensors(config, source)
    graph, state = nnx.split(abstract_llama(config, jnp.dtype(dtype)))
    variables = dict(nnx.to_flat_state(state))
    filled = {}
    for target in weight_plan(config):
        variable = variables.pop(target.path)
        is_norm = variable.dtype == jnp.float32
        host = _read_target(target, source, np.dtype(np.float32) if is_norm else host_dtype)
        assert host.shape == variable.shape, (target.path, host.shape, variable.shape)
        filled[target.path] = variable.replace(jnp.asarray(host))
    assert not variables, f"no weight is planned for {list(variables)}"
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _check_tensors(config: ModelConfig, source: WeightSource) -> None:
    shapes = source.shapes()
    expected = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for target in weight_plan(config):
        for part in target.parts:
            expected.add(part.name)
            found = shapes.get(part.name)
            if found is None and not part.optional:
                raise ModelError(
                    f"{source.where}: the tensor {part.name} is missing, "
                    "so the checkpoint is incomplete; fetch it again"
                )
            if found is not None and found != part.shape:
                raise ModelError(
                    f"{source.where}: the tensor {part.name} is {found} where the config says {part.shape}"
                )
    for name in shapes:
        if name not in expected:
            raise ModelError(
                f"{source.where}: the tensor {name} has no place in a {config.architecture} of this config, "
                "so the model would not compute what was trained"
            )


def _read_target(target: WeightTarget, source: WeightSource, dtype: np.dtype) -> np.ndarray:
    rows = sum(part.shape[0] for part in target.parts)
    host = np.empty((rows, *target.parts[0].shape[1:]), dtype)
    present = source.shapes()
    start = 0
    for part in target.parts:
        stop = start + part.shape[0]
        if part.name in present:
            try:
                with np.errstate(over="raise"):
                    source.read_into(part, host[start:stop])
            except FloatingPointError as error:
                raise ModelError(
                    f"{source.where}: the tensor {part.name} has values past {dtype.name}'s range; "
                    "load it as bfloat16 or float32"
                ) from error
        else:
            host[start:stop] = 0
        start = stop
    return host
