"""A model on a mesh of chips: one step runs on all of them, each on its part, inside `jax.shard_map`.

    weights   by tp (heads, inner units, vocabulary), experts by ep too, and of that a part by fsdp
    pages     each chip's own: of its replica's sequences, of its KV heads
    inputs    of all replicas on every chip, which takes its own
    logits    each chip makes those of its part of the vocabulary for all rows, then draws for some rows from
              all of the vocabulary: less is exchanged, and less drawn, than with all logits everywhere
    outputs   on every chip

A step of one chip is the step of one device: what is exchanged is in `Linear` (the sums after a split
product), `ShardedModel` (embeddings, gathered weights) and here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.batch import BatchBuilder
from engine.compiled_steps import CompiledSteps
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.mesh import AXES, REPLICA_AXES, TENSOR_AXIS, check_experts
from engine.models.abstract import abstract_sharded_model
from engine.models.config import ModelConfig
from engine.models.llama import Llama
from engine.models.sharded import ModelWeights, ShardedModel, WeightReader, shard_model
from engine.models.tensor_split import TensorSplit
from engine.page_copies import PageCopier
from engine.replica_batch import ReplicaBatch, ReplicaPageCopier
from engine.sampler import SamplingInputs, StepOutputs, sample
from engine.step_inputs import StepArrays, StepShape
from kernels.paged_attention import PageLayout, Pages

_EVERYWHERE = PartitionSpec()
_OWN = PartitionSpec((*REPLICA_AXES, TENSOR_AXIS))
"""Arrays of which each chip has one of its own, behind one another along the first axis."""


class MeshPlacement:
    """A `Placement` on the chips of a mesh."""

    is_mesh = True

    def __init__(self, config: EngineConfig, model_config: ModelConfig, mesh: Mesh):
        check_experts(model_config.num_experts, mesh.shape)
        if config.compiled_steps_path is not None and jax.process_count() > 1:
            raise ConfigError(
                "engine.compiled_steps_path: steps that several processes run together are not kept; "
                "leave it out"
            )
        self._config = config
        self._mesh = mesh
        self._split = TensorSplit(model_config, mesh.shape[TENSOR_AXIS], config.weight_format)
        self.local_config = self._split.local_config
        self.num_replicas = mesh.shape["dp"] * mesh.shape["fsdp"]
        self.num_sharing = len(mesh.local_devices)
        self.device = mesh.local_devices[0]
        self.devices = list(mesh.devices.flat)
        self._inputs = NamedSharding(mesh, _EVERYWHERE)
        self._vocab_size = model_config.vocab_size
        sizes = "".join(f" {name}={mesh.shape[name]}" for name in AXES if mesh.shape[name] > 1)
        self._weight_specs: Any = None  # known once there are weights
        self.description = f", {mesh.size} devices:{sizes}"

    def sample(self, logits: jax.Array, inputs: SamplingInputs, backend: str) -> StepOutputs:
        return sample_by_parts(logits, inputs, backend, vocab_size=self._vocab_size)

    def pack(self, model: Llama | WeightReader, backend: str, *, takes_weights: bool) -> ShardedModel:
        weights = ModelWeights(model, takes_weights) if isinstance(model, Llama) else model
        return self._placed(shard_model(weights, self._split, self._mesh, backend, self._config.dtype))

    def abstract_model(self, backend: str) -> ShardedModel:
        return self._placed(abstract_sharded_model(self._split, self._mesh, backend, self._config.dtype))

    def empty_pages(self, layout: PageLayout, num_pages: int) -> Pages:
        return jax.jit(self._own_pages(layout, num_pages))()

    def abstract_pages(self, layout: PageLayout, num_pages: int) -> Pages:
        own = NamedSharding(self._mesh, _OWN)
        pages = jax.eval_shape(self._own_pages(layout, num_pages))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), pages)

    def jit_step(self, step: Any) -> Any:
        def on_mesh(
            shape: StepShape, model: ShardedModel, kv_pages: Pages, arrays: StepArrays
        ) -> tuple[Pages, StepOutputs]:
            def on_chip(
                model: ShardedModel, kv_pages: Pages, arrays: StepArrays
            ) -> tuple[Pages, StepOutputs]:
                kv_pages, outputs = step(shape, model, kv_pages, _own_of(arrays))
                return kv_pages, jax.tree.map(lambda x: jax.lax.all_gather(x, REPLICA_AXES), outputs)

            in_specs = (self._weight_specs, _OWN, _EVERYWHERE)
            return self._map(on_chip, in_specs, (_OWN, _EVERYWHERE))(model, kv_pages, arrays)

        return jax.jit(on_mesh, donate_argnums=2, static_argnums=0)

    def jit_copy(self, copy: Any) -> Any:
        def on_chip(kv_pages: Pages, *arrays: jax.Array) -> Pages:
            return copy(kv_pages, *_own_of(arrays))

        def on_mesh(kv_pages: Pages, *arrays: jax.Array) -> Pages:
            specs = (_OWN, *(_EVERYWHERE for _ in arrays))
            return self._map(on_chip, specs, _OWN)(kv_pages, *arrays)

        return jax.jit(on_mesh, donate_argnums=0)

    def agree(self, num_pages: int) -> int:
        if jax.process_count() == 1:
            return num_pages
        from jax.experimental import multihost_utils

        return int(multihost_utils.process_allgather(np.int32(num_pages)).min())

    def make_batch(self, **options: Any) -> ReplicaBatch:
        builders = [BatchBuilder(device=self._inputs, **options) for _ in range(self.num_replicas)]
        return ReplicaBatch(builders, self._inputs)

    def make_copier(
        self, layout: PageLayout, num_layers: int, num_pages: int, max_copies: int, saved: CompiledSteps
    ) -> PageCopier:
        return ReplicaPageCopier(layout, num_layers, num_pages, max_copies, self, saved)

    def _placed(self, model: ShardedModel) -> ShardedModel:
        self._weight_specs = jax.tree.map(lambda x: x.sharding.spec, model)
        return model

    def _own_pages(self, layout: PageLayout, num_pages: int) -> Any:
        return self._map(lambda: layout.empty(num_pages), (), _OWN)

    def _map(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        # Calls into kernels say nothing of what varies over which axis, so it cannot be checked.
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def _own_of(stacked: Any) -> Any:
    """What this chip's replica has of arrays with one entry a replica."""
    replica = jax.lax.axis_index(REPLICA_AXES)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, replica, keepdims=False), stacked)


def sample_by_parts(
    logits: jax.Array, inputs: SamplingInputs, backend: str, *, vocab_size: int
) -> StepOutputs:
    """`sample`, for logits f32[L, V / tp] of which each chip of the tp axis has its part of the vocabulary.

    Each chip draws for its share of the rows. Inside `shard_map`; the outputs are the same on all chips.
    """
    num_rows, num_chips = logits.shape[0], jax.lax.axis_size(TENSOR_AXIS)
    each = -(-num_rows // num_chips)
    first = jax.lax.axis_index(TENSOR_AXIS) * each

    def filled(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, each * num_chips - num_rows)] + [(0, 0)] * (x.ndim - 1))

    def share(x: jax.Array) -> jax.Array:
        return x if x.ndim == 0 else jax.lax.dynamic_slice_in_dim(filled(x), first, each)

    logits = jax.lax.all_to_all(filled(logits), TENSOR_AXIS, 0, 1, tiled=True)[:, :vocab_size]
    inputs = jax.tree.map(share, inputs)
    inputs = inputs._replace(num_rows=jnp.clip(inputs.num_rows - first, 0, each))
    outputs = sample(logits, inputs, backend)
    return jax.tree.map(lambda x: jax.lax.all_gather(x, TENSOR_AXIS, tiled=True)[:num_rows], outputs)
