"""Other weights for a model that runs: shapes checked, the compiled steps kept.

What was computed with the old weights is worth nothing afterwards: keys and values of running requests are
computed anew from their tokens, as after a preemption, and cached prefixes are forgotten. Tokens drawn so far
stay, with the log-probabilities that they were drawn with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from engine.checkpoints import LoadedModel
from engine.checkpoints.weights import Span, StoredWeights
from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.llama import Llama, WeightPart
from engine.models.packed import PackedModel

NewWeights = LoadedModel | Llama | StoredWeights | Mapping[str, Any]


def weights_for(new: NewWeights, config: ModelConfig, dtype: str) -> Llama | StoredWeights:
    """New weights in the form that a runner packs, of a model of `config`.

    new: a loaded model, its modules, weights still in a checkpoint, or arrays by their Hugging Face names.
    Raises ModelError where they are of a model of other sizes, or a tensor is missing or of another shape.
    """
    if isinstance(new, Mapping):
        return StoredWeights(config, _NamedArrays(new), dtype)
    if isinstance(new, LoadedModel):
        _check_same_sizes(config, new.config)
        return new.stored or new.model
    if isinstance(new, Llama):
        _check_same_sizes(config, new.config)
    return new


def with_other_arrays(old: PackedModel, new: PackedModel) -> PackedModel:
    """The arrays of `new` as the model that the steps were compiled for.

    Raises ModelError naming the first array that is of another shape or type.
    """
    before = jax.tree_util.tree_leaves_with_path(old)
    after = dict(jax.tree_util.tree_leaves_with_path(new))
    if len(before) != len(after):
        raise ModelError(f"the new weights are {len(after)} arrays and the model runs {len(before)}")
    arrays = []
    for path, array in before:
        name, other = jax.tree_util.keystr(path), after.get(path)
        if other is None or (other.shape, other.dtype) != (array.shape, array.dtype):
            found = "missing" if other is None else f"{other.dtype}{list(other.shape)}"
            raise ModelError(
                f"the new weights do not fit the model that runs: {name} is {found}, not "
                f"{array.dtype}{list(array.shape)}; load them with the same dtype, or use swap_model"
            )
        arrays.append(other)
    return jax.tree.unflatten(jax.tree.structure(old), arrays)


def _check_same_sizes(config: ModelConfig, other: ModelConfig) -> None:
    # Which tokens end a text is the engine's, not the weights'.
    given = replace(other, eos_token_ids=config.eos_token_ids, bos_token_id=config.bos_token_id)
    if given == config:
        return
    names = [name for name in config.__dataclass_fields__ if getattr(given, name) != getattr(config, name)]
    said = ", ".join(f"{name} {getattr(config, name)} -> {getattr(other, name)}" for name in names[:3])
    raise ModelError(f"the new weights are of another model ({said}): use swap_model")


class _NamedArrays:
    """Arrays in memory, as a `WeightSource`."""

    where = "the new weights"

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = arrays

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(np.shape(array)) for name, array in self._arrays.items()}

    def read_into(
        self, part: WeightPart, target: np.ndarray, rows: Span | None = None, columns: Span | None = None
    ) -> None:
        array = np.asarray(self._arrays[part.name])
        array = array if rows is None else array[slice(*rows)]
        target[...] = array if columns is None else array[:, slice(*columns)]
