"""What of a model fits on a slice of chips: bytes by kind, pages, the longest context, the largest model.

Counted from the model's config alone, the way the engine would lay everything out; only the temporaries of a
step are the compiler's to say (`engine.topology_compile`), and estimated where it is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from jax.sharding import AbstractMesh

from engine.backends import Backends
from engine.buckets import Bucket, declare_buckets
from engine.chips import Slice, slices_of
from engine.config import EngineConfig
from engine.memory import pages_in
from engine.mesh import AXES, REPLICA_AXES, TENSOR_AXIS, WEIGHTS_AXIS, check_experts, mesh_shape
from engine.models.abstract import abstract_model, abstract_sharded_model, num_parameters, share_of
from engine.models.config import ModelConfig
from engine.models.packed import bytes_on_device
from engine.models.tensor_split import TensorSplit
from engine.roofline import Roofline
from kernels.paged_attention import PageLayout, page_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """All bytes are of one device; a chip is one, but for those that show themselves as several."""

    topology: Slice
    mesh: Mapping[str, int]
    """Devices along each of `engine.mesh.AXES`."""
    num_parameters: int
    model: ModelConfig
    share: ModelConfig
    config: EngineConfig
    max_model_len: int
    weight_bytes: int
    read_bytes: int
    """Of the weights, what every step reads: all but experts, and embeddings unless they are gathered."""
    expert_bytes: int
    """Of the weights, the experts'."""
    layer_bytes: int
    """Of the weights, one layer's."""
    page_bytes: int
    temporary_bytes: int
    is_estimate: bool
    """The temporaries are a formula's, not the compiler's."""

    @property
    def budget_bytes(self) -> int:
        """What weights, temporaries and pages may take together."""
        if self.config.kv_cache_bytes is not None:
            return self.topology.usable_bytes
        return int(self.topology.usable_bytes * self.config.hbm_utilization)

    @property
    def free_bytes(self) -> int:
        """For pages; negative when not even the weights fit."""
        free = self.budget_bytes - self.weight_bytes - self.temporary_bytes
        wanted = self.config.kv_cache_bytes
        return free if wanted is None else min(free, wanted)

    @property
    def num_replicas(self) -> int:
        """Batches that run side by side, each with a scheduler, and with pages of its own."""
        return math.prod(self.mesh[axis] for axis in REPLICA_AXES)

    @property
    def num_pages(self) -> int:
        """Of a replica, as are tokens."""
        return pages_in(self.free_bytes, self.config, self.page_bytes, self.max_model_len)

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit at a time."""
        return self.num_pages * self.config.page_size

    @property
    def fits(self) -> bool:
        """One sequence of `max_model_len` can run."""
        return self.num_pages >= self._pages_each

    @property
    def largest_context(self) -> int:
        """Tokens of the longest single sequence that there is memory for, whatever the model was made for."""
        return max(0, self.free_bytes) // self.page_bytes * self.config.page_size

    @property
    def largest_num_layers(self) -> int:
        """Layers of this model's shape that fit with one sequence of `max_model_len`; 0: not one does."""
        outside = self.weight_bytes - self.model.num_layers * self.layer_bytes
        free = self.budget_bytes - outside - self.temporary_bytes
        pages = self._pages_each * self.page_bytes // self.model.num_layers
        return max(0, free // (self.layer_bytes + pages))

    @property
    def largest_num_parameters(self) -> int:
        """Of a model of this shape with so many layers; 0: not one layer fits."""
        if not self.largest_num_layers:
            return 0
        return num_parameters(replace(self.model, num_layers=self.largest_num_layers))

    @property
    def _pages_each(self) -> int:
        return -(-self.max_model_len // self.config.page_size)

    def roofline(self) -> Roofline:
        return Roofline(
            topology=self.topology,
            model=self.model,
            share=self.share,
            mesh=self.mesh,
            weight_bytes=self.read_bytes,
            expert_bytes=self.expert_bytes,
            kv_token_bytes=self.page_bytes / self.config.page_size,
            dtype=self.config.dtype,
        )

    def what_would_fit(self) -> Iterator[tuple[str, DevicePlan]]:
        """Changes that would make it fit, each by itself and each as little as will do, with their plans."""
        narrower = {"float32": ("int8", "int4"), "bfloat16": ("int8", "int4"), "int8": ("int4",), "int4": ()}
        for weight_format in narrower[self.config.weight_format]:
            found = self._with(replace(self.config, weight_dtype=weight_format))
            if found.fits:
                yield f"engine.weight_dtype={weight_format}", found
                break
        if self.config.page_dtype != "int8":
            found = self._with(replace(self.config, kv_dtype="int8"))
            if found.fits:
                yield "engine.kv_dtype=int8", found
        if self.config.page_size <= self.largest_context < self.max_model_len:
            found = plan_device(self.model, self.config, self.topology, self.largest_context)
            yield f"engine.max_model_len={self.largest_context}", found
        larger = (each for each in slices_of(self.topology.chip) if each.num_chips > self.topology.num_chips)
        for topology in larger:
            found = plan_device(self.model, self.config, topology, self.max_model_len)
            if found.fits:
                yield f"plan.topology={topology.name}", found
                break

    def _with(self, config: EngineConfig) -> DevicePlan:
        return plan_device(self.model, config, self.topology, self.max_model_len)


def plan_device(
    model: ModelConfig,
    config: EngineConfig,
    topology: Slice,
    max_model_len: int,
    temporary_bytes: int | None = None,
) -> DevicePlan:
    """The plan of a model on the devices of `topology`, as `config.sharding_axis_dims` spreads it over them.

    temporary_bytes: of the largest step, as compiled; None: estimated.

    Raises ConfigError where the axes, the devices and the model do not go together.
    """
    mesh = AbstractMesh(mesh_shape(config.sharding_axis_dims, topology.num_devices), AXES)
    check_experts(model.num_experts, mesh.shape)
    share = share_of(model, mesh.shape[TENSOR_AXIS], config.weight_format)
    backends = Backends.choose(config, topology.chip.platform)
    if mesh.size == 1:
        packed = abstract_model(model, config.weight_format, backends.linear, config.dtype)
    else:
        split = TensorSplit(model, mesh.shape[TENSOR_AXIS], config.weight_format)
        packed = abstract_sharded_model(split, mesh, backends.linear, config.dtype)
    layout = layout_of(share, config, backends)
    num_gathered = mesh.shape[WEIGHTS_AXIS]
    estimate = estimated_temporaries(share, config, buckets_of(config, backends)[-1])
    if num_gathered > 1:  # two layers: one is gathered while the one before it is used
        estimate += 2 * num_gathered * bytes_on_device(packed.layers) // share.num_layers
        estimate += num_gathered * bytes_on_device((packed.head, packed.embed))
    experts = bytes_on_device([part for name, part in packed.layers.items() if ".experts." in name])
    unread = 0 if num_gathered > 1 else bytes_on_device(packed.embed)
    return DevicePlan(
        topology=topology,
        mesh=dict(mesh.shape),
        num_parameters=num_parameters(model),
        model=model,
        share=share,
        config=config,
        max_model_len=max_model_len,
        weight_bytes=packed.num_bytes,
        read_bytes=packed.num_bytes - experts - unread,
        expert_bytes=experts,
        layer_bytes=bytes_on_device(packed.layers) // share.num_layers,
        page_bytes=layout.page_bytes * share.num_layers,
        temporary_bytes=estimate if temporary_bytes is None else temporary_bytes,
        is_estimate=temporary_bytes is None,
    )


def layout_of(share: ModelConfig, config: EngineConfig, backends: Backends) -> PageLayout:
    """How the pages of one device's share lie."""
    return page_layout(
        backends.attention, share.num_kv_heads, share.head_dim, config.page_size, config.page_dtype
    )


def buckets_of(config: EngineConfig, backends: Backends) -> tuple[Bucket, ...]:
    """The steps that an engine with these options declares."""
    return declare_buckets(
        config.min_token_pad,
        config.max_num_batched_tokens,
        config.max_num_seqs + config.num_draft_logits,
        min_input_pad=config.min_input_pad,
        skips_padding=backends.skips_padding,
    )


def estimated_temporaries(share: ModelConfig, config: EngineConfig, bucket: Bucket) -> int:
    """Bytes that a step's intermediate results take at a time, at most, where no compiler says so.

    The MLP's gate and up in f32 with what they become, or the logits with three copies that drawing makes;
    the stream; of quantised weights the largest matrix, widened; the head laid out anew, as libtpu does with
    small models. libtpu needs less (`tests/engine/test_topology_compile.py`).
    """
    itemsize = 4 if config.dtype == "float32" else 2
    tokens, logits = bucket
    mlp = tokens * 2 * share.intermediate_size * (4 + itemsize)
    stream = 4 * tokens * share.d_model * itemsize
    if share.num_experts:  # each token once for every expert it chose: in order, made, and put back
        stream += 3 * tokens * share.experts_per_token * share.d_model * itemsize
    drawing = 4 * logits * share.vocab_size * 4
    widened = 0
    if config.weight_format in ("int8", "int4"):
        widened = max(2 * share.intermediate_size, share.vocab_size) * share.d_model * itemsize
    head = share.vocab_size * share.d_model * (4 + itemsize)
    return max(mlp, drawing) + stream + widened + head
