"""Shapes of a model on a mesh, made without a weight, are those of its arrays there."""

from __future__ import annotations

import jax
import pytest

from engine.checkpoints import load
from engine.models.abstract import abstract_sharded_model
from engine.models.sharded import ModelWeights, shard_model
from engine.models.tensor_split import TensorSplit
from engine.platforms import make_mesh
from kernels.linear import available_backends
from tests.sharding.meshes import checkpoint
from tests.sharding.test_meshes import EXPERTS


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("weight_format", ["float32", "int8"])
@pytest.mark.parametrize(
    ("dims", "model"),
    [
        ((1, 1, 1, 4, 1), {"tie_word_embeddings": True}),
        ((2, 1, 1, 3, 1), {"tie_word_embeddings": False}),
        ((1, 3, 1, 2, 1), {"tie_word_embeddings": False}),
        ((1, 2, 2, 2, 1), EXPERTS),
    ],
)
def test_shapes_and_places_are_those_of_the_arrays(dims, model, weight_format: str, backend: str):
    mesh = make_mesh(dims)
    assert mesh is not None
    loaded = load(checkpoint(**model), dtype="float32")
    split = TensorSplit(loaded.config, mesh.shape["tp"], weight_format)
    sharded = shard_model(ModelWeights(loaded.model, False), split, mesh, backend, "float32")
    abstract = abstract_sharded_model(split, mesh, backend, "float32")
    assert jax.tree.structure(abstract) == jax.tree.structure(sharded)
    for (path, leaf), found in zip(
        jax.tree_util.tree_leaves_with_path(sharded), jax.tree.leaves(abstract), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype), name
        assert found.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
    assert abstract.num_bytes == sharded.num_bytes
