"""Filling a model from a checkpoint, tensor by tensor, so that memory stays near the size of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.llama import Llama, WeightPart, WeightTarget, abstract_llama, weight_plan
from engine.models.tensor_split import Cut

DTYPES = ("float32", "bfloat16", "float16")
"""What weights may be loaded as."""


Span = tuple[int, int]
"""[start, stop)."""


class WeightSource(Protocol):
    """The tensors of a checkpoint, by their Hugging Face names."""

    where: str
    """What an error calls the checkpoint."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, without reading any."""
        ...

    def read_into(
        self, part: WeightPart, target: np.ndarray, rows: Span | None = None, columns: Span | None = None
    ) -> None:
        """Write one tensor into `target`, which has its shape and any of `DTYPES`; or only the rows and
        columns [start, stop) of it, a vector's entries being rows."""
        ...


def check_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of a name in `DTYPES`."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return np.dtype(jnp.dtype(dtype))


class StoredWeights:
    """The weights of `source` as the arrays of a model of `config`, each read when it is asked for.

    Names and shapes are checked at once, before anything is allocated: a missing tensor, one of another
    shape, or one the architecture has no place for is a ModelError. Norm weights stay float32.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, dtype: str = "float32"):
        check_dtype(dtype)
        _check_tensors(config, source)
        self._source = source
        self._graph, state = nnx.split(abstract_llama(config, jnp.dtype(dtype)))
        self._variables: dict[Any, Any] = dict(nnx.to_flat_state(state))
        self._targets = {target.path: target for target in weight_plan(config)}
        unplanned = self._variables.keys() - self._targets.keys()
        assert not unplanned, f"no weight is planned for {list(unplanned)}"

    def read(self, path: tuple[str | int, ...]) -> np.ndarray:
        """The array at `path` in the model's nnx state, on the host."""
        variable = self._variables[path]
        host = _read_target(self._targets[path], self._source, np.dtype(variable.dtype))
        assert host.shape == variable.shape, (path, host.shape, variable.shape)
        return host

    def read_part(self, path: tuple[str | int, ...], cut: Cut) -> np.ndarray:
        """What `cut` takes of that array; no more is read than spans it."""
        variable, target = self._variables[path], self._targets[path]
        shape = list(variable.shape)
        shape[cut.axis] = len(cut.indices)
        out = np.zeros(shape, variable.dtype)
        start = 0
        for part in target.parts:
            # Of the rows of all parts together, those of this one; columns are those of each.
            stop = start + part.shape[0] if cut.axis == 0 else part.shape[1]
            is_here = (cut.indices >= start) & (cut.indices < stop)
            if is_here.any() and part.name in self._source.shapes():
                wanted = cut.indices[is_here] - start
                span = (int(wanted.min()), int(wanted.max()) + 1)
                held = list(part.shape)
                held[cut.axis] = span[1] - span[0]
                read = np.empty(held, variable.dtype)
                _read(self._source, part, read, **{("rows", "columns")[cut.axis]: span})
                out[(slice(None),) * cut.axis + (is_here,)] = np.take(read, wanted - span[0], cut.axis)
            start = stop if cut.axis == 0 else 0
        return out

    def load(self) -> Llama:
        """The model with all of them, on JAX's first device."""
        filled = {
            path: variable.replace(jnp.asarray(self.read(path))) for path, variable in self._variables.items()
        }
        return nnx.merge(self._graph, nnx.from_flat_state(filled))


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
            _read(source, part, host[start:stop])
        else:
            host[start:stop] = 0
        start = stop
    return host


def _read(source: WeightSource, part: WeightPart, target: np.ndarray, **spans: Span) -> None:
    try:
        with np.errstate(over="raise"):
            source.read_into(part, target, **spans)
    except FloatingPointError as error:
        raise ModelError(
            f"{source.where}: the tensor {part.name} has values past {target.dtype.name}'s range; "
            "load it as bfloat16 or float32"
        ) from error
