"""Where a model runs: one device, as it is here, or a mesh of them (`engine.sharding`).

A runner asks its placement for the weights, the pages and the compiled steps, and is otherwise the same.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from engine.batch import BatchBuilder
from engine.checkpoints.weights import StoredWeights
from engine.compiled_steps import CompiledSteps
from engine.config import EngineConfig
from engine.models.abstract import abstract_model
from engine.models.config import ModelConfig
from engine.models.packed import PackedModel, pack_model
from engine.page_copies import PageCopier
from engine.platforms import make_mesh
from engine.sampler import SamplingInputs, StepOutputs, sample
from kernels.paged_attention import PageLayout, Pages


class Placement(Protocol):
    """Numbers of pages and bytes are one chip's."""

    device: Any
    """One of the devices, for what is the same on all."""
    devices: list[Any]
    """All that run a step."""
    local_config: ModelConfig
    """The model's sizes as each device sees them."""
    num_replicas: int
    """Batches that a step runs, each with pages of its own."""
    is_mesh: bool
    """Plans, inputs and outputs are those of `engine.replicas`, of one replica or more."""
    num_sharing: int
    """Devices that share the memory of this host, where it is theirs."""
    description: str

    def sample(self, logits: jax.Array, inputs: SamplingInputs, backend: str) -> StepOutputs:
        """`engine.sampler.sample`, for logits as the model here makes them."""
        ...

    def pack(self, model: Any, backend: str, *, takes_weights: bool) -> PackedModel:
        """The weights of a `Llama` or `StoredWeights`, packed for the products' backend; see `pack_model`."""
        ...

    def abstract_model(self, backend: str) -> PackedModel:
        """The shapes of what `pack` makes, to compile for."""
        ...

    def empty_pages(self, layout: PageLayout, num_pages: int) -> Pages: ...

    def abstract_pages(self, layout: PageLayout, num_pages: int) -> Pages:
        """Their shapes, to compile for."""
        ...

    def jit_step(self, step: Any) -> Any:
        """(shape, model, kv_pages, arrays) -> (kv_pages, outputs), the pages donated, the shape static."""
        ...

    def jit_copy(self, copy: Any) -> Any:
        """(kv_pages, copies, num_copies) -> kv_pages, the pages donated."""
        ...

    def agree(self, num_pages: int) -> int:
        """The least of what fits in any process."""
        ...

    def make_batch(self, **options: Any) -> Any:
        """The `BatchBuilder` of these options, or what stands for it."""
        ...

    def make_copier(
        self, layout: PageLayout, num_layers: int, num_pages: int, max_copies: int, saved: CompiledSteps
    ) -> PageCopier: ...


def choose_placement(config: EngineConfig, model_config: ModelConfig) -> Placement:
    """One device, or a mesh where there are more. Raises ConfigError (`engine.mesh`)."""
    return placement_on(make_mesh(config.sharding_axis_dims), config, model_config)


def placement_on(mesh: Mesh | None, config: EngineConfig, model_config: ModelConfig) -> Placement:
    """The placement on a mesh; without one (None) on JAX's first device."""
    if mesh is None:
        return OneDevice(config, model_config)
    from engine.sharding import MeshPlacement  # late: nothing of it is needed on one device

    return MeshPlacement(config, model_config, mesh)


class OneDevice:
    """All on JAX's first device: nothing is split."""

    num_replicas = 1
    is_mesh = False
    num_sharing = 1
    description = ""
    sample = staticmethod(sample)

    def __init__(self, config: EngineConfig, model_config: ModelConfig):
        self.device = jax.devices()[0]
        self.devices = [self.device]
        self.local_config = model_config
        self._config = config

    def pack(self, model: Any, backend: str, *, takes_weights: bool) -> PackedModel:
        model = model.load() if isinstance(model, StoredWeights) else model
        packed = pack_model(model, self._config.weight_format, backend, takes_weights=takes_weights)
        return jax.device_put(packed, self.device)

    def abstract_model(self, backend: str) -> PackedModel:
        config = self._config
        return abstract_model(self.local_config, config.weight_format, backend, config.dtype)

    def empty_pages(self, layout: PageLayout, num_pages: int) -> Pages:
        return jax.device_put(layout.empty(num_pages), self.device)

    def abstract_pages(self, layout: PageLayout, num_pages: int) -> Pages:
        return jax.eval_shape(lambda: layout.empty(num_pages))

    def jit_step(self, step: Any) -> Any:
        return jax.jit(step, donate_argnums=2, static_argnums=0)

    def jit_copy(self, copy: Any) -> Any:
        return jax.jit(copy, donate_argnums=0)

    def agree(self, num_pages: int) -> int:
        return num_pages

    def make_batch(self, **options: Any) -> BatchBuilder:
        return BatchBuilder(device=self.device, **options)

    def make_copier(
        self, layout: PageLayout, num_layers: int, num_pages: int, max_copies: int, saved: CompiledSteps
    ) -> PageCopier:
        return PageCopier(layout, num_layers, num_pages, max_copies, self, saved)
