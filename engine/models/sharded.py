"""A model's packed weights on the chips of a mesh, put there tensor by tensor.

A chip's part is packed as one device's model of a chip's sizes would be (`TensorSplit.local_config`), so a
step inside `shard_map` runs the code of one device on it. How a backend lays out what it packs stays its own:
a global array is nothing but the chips' arrays behind one another along the first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.mesh import AXES, EXPERT_AXIS, TENSOR_AXIS, WEIGHTS_AXIS
from engine.models.llama import Layer, Llama
from engine.models.mixture import SplitAxes
from engine.models.packed import PackedModel, Path, every_expert, head_format_of, head_is_embedding
from engine.models.tensor_split import Cut, TensorSplit
from kernels.linear import PackedWeight, PackedWeights, pack_weights, weight_rows
from kernels.linear.layout import WeightMeta

Chip = tuple[int, int]
"""A place on the ep axis and one on the tp axis."""


class WeightReader(Protocol):
    """The arrays of a model, by their paths in its nnx state."""

    def read(self, path: Path) -> np.ndarray:
        """One array, whole, on the host. Each is read once."""
        ...

    def read_part(self, path: Path, cut: Cut) -> np.ndarray:
        """What `cut` takes of it."""
        ...


class ModelWeights:
    """The arrays of a model in memory; `takes`: they are deleted behind the reader."""

    def __init__(self, model: Llama, takes: bool):
        self._variables = dict(nnx.to_flat_state(nnx.state(model)))
        self._takes = takes

    def read(self, path: Path) -> np.ndarray:
        array = self._variables[path].get_value()
        host = np.array(array)
        if self._takes:
            array.delete()
        return host

    def read_part(self, path: Path, cut: Cut) -> np.ndarray:
        return cut.of(np.asarray(self._variables[path].get_value()))


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["meta", "sizes", "num_each"])
@dataclass(frozen=True, slots=True)
class GatheredWeights:
    """`PackedWeights` of which each chip of the fsdp axis holds a part; a layer's are gathered for its use.

    `arrays` are as the backend's, an array being cut along the first axis of a matrix's.
    """

    arrays: tuple[Any, ...]
    meta: WeightMeta
    sizes: tuple[int, ...]
    """How long that axis is of each array, without what fills up the last part."""
    num_each: int
    """Matrices of a layer: its experts, or one."""

    def gathered(self, first: jax.Array | int) -> PackedWeights:
        """The matrices of the layer that begins with number `first`, whole on every chip. In `shard_map`."""

        def whole(parts: Sequence[jax.Array], axis: int) -> tuple[jax.Array, ...]:
            gathered = [jax.lax.all_gather(part, WEIGHTS_AXIS, axis=axis, tiled=True) for part in parts]
            sized = zip(gathered, self.sizes, strict=True)
            return tuple(jax.lax.slice_in_dim(x, 0, size, axis=axis) for x, size in sized)

        meta = replace(self.meta, num_layers=self.num_each)
        if meta.backend == "cpu":
            parts = [jax.lax.dynamic_slice_in_dim(x, first, self.num_each) for x in self.arrays]
            return PackedWeights(whole(parts, axis=1), meta)
        starts = range(0, len(self.arrays), self.num_each)
        layers = [partial(tuple, self.arrays[start : start + self.num_each]) for start in starts]
        matrices = layers[0]() if len(layers) == 1 else jax.lax.switch(first // self.num_each, layers)
        return PackedWeights(tuple(whole(matrix, axis=0) for matrix in matrices), meta)

    def layer(self, first: jax.Array | int) -> PackedWeight:
        return self.gathered(first).layer(0)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "norm", "head", "embed"],
    meta_fields=["config", "layer_graph", "dtype", "vocab_each"],
)
@dataclass(frozen=True, slots=True)
class ShardedModel(PackedModel):
    """A `PackedModel` on a mesh. Inside `shard_map` its arrays, and `config`, are one chip's.

    `embed` is packed like a matrix of one layer; it and `head` have `vocab_each` rows a chip.
    """

    vocab_each: int = 0

    def embedded(self, token_ids: jax.Array) -> jax.Array:
        """i32[T] -> [T, D]: each row from the chip that has it."""
        place = token_ids - jax.lax.axis_index(TENSOR_AXIS) * self.vocab_each
        table: Any = self.head if self.embed is None else self.embed
        if isinstance(table, GatheredWeights):
            table = table.gathered(0)
        rows = weight_rows(table, jnp.clip(place, 0, self.vocab_each - 1)).astype(self.dtype)
        is_here = (place >= 0) & (place < self.vocab_each)
        return jax.lax.psum(jnp.where(is_here[:, None], rows, jnp.zeros_like(rows)), TENSOR_AXIS)


def shard_model(
    weights: WeightReader, split: TensorSplit, mesh: Mesh, backend: str, dtype: str
) -> ShardedModel:
    """Pack a model's weights, as `split` cuts them, on the chips of `mesh` that this process has.

    backend, dtype: of the products, and of activations. No more than one tensor is held on the host, but for
    the native backend, whose chips are the host.
    """
    writer = _Writer(mesh, split, backend)
    config, local = split.config, split.local_config
    axes = SplitAxes(TENSOR_AXIS, EXPERT_AXIS, mesh.shape[EXPERT_AXIS])
    layer = nnx.eval_shape(lambda: Layer(local, jnp.dtype(dtype), axes, is_packed=True))
    layers: dict[str, Any] = {}
    state: Any = nnx.to_flat_state(nnx.state(layer))
    for path, variable in state:
        paths: list[Path] = [
            ("layers", index, *each)
            for index in range(config.num_layers)
            for each in every_expert(path, config)
        ]
        name = ".".join(map(str, path))
        if len(variable.shape) == 2:
            stored_as = dtype if "router" in path else split.weight_format
            layers[name] = writer.matrices(weights, paths, stored_as, is_gated="gate_up" in path)
        else:
            layers[name] = writer.vectors(weights, paths)
    is_tied = config.tie_word_embeddings
    formats = {"head": head_format_of(split.weight_format), "embed": dtype}
    embedding = writer.parts(weights, ("embed",))
    embed = None
    if not head_is_embedding(config, formats["head"]):
        embed = writer.matrix(embedding, formats["embed"], "xla")
    if not is_tied:
        embedding.clear()
        embedding = writer.parts(weights, ("head", "weight"))
    head = writer.matrix(embedding, formats["head"], backend)
    return ShardedModel(
        layers=layers,
        norm=writer.vector(weights, ("norm", "weight")),
        head=head,
        embed=embed,
        config=local,
        layer_graph=nnx.graphdef(layer),
        dtype=dtype,
        vocab_each=split.vocab_each,
    )


class _Writer:
    """Packs a chip's part of arrays and puts it on the chips that have it."""

    def __init__(self, mesh: Mesh, split: TensorSplit, backend: str):
        self._mesh = mesh
        self._split = split
        self._backend = backend
        self._parts = mesh.shape[WEIGHTS_AXIS]
        self._experts_each = split.config.num_experts // mesh.shape[EXPERT_AXIS]
        # The devices of this process, with their places on the fsdp axis.
        self._devices: dict[Chip, list[tuple[int, Any]]] = {}
        for place, device in np.ndenumerate(mesh.devices):
            if device.process_index == jax.process_index():
                at = dict(zip(AXES, place, strict=True))
                self._devices.setdefault((at[EXPERT_AXIS], at[TENSOR_AXIS]), []).append(
                    (at[WEIGHTS_AXIS], device)
                )

    def matrices(
        self, weights: WeightReader, paths: Sequence[Path], weight_format: str, is_gated: bool
    ) -> Any:
        """One matrix a layer, or an expert of a layer, packed together."""
        packed: dict[Chip, list[PackedWeights]] = {chip: [] for chip in self._devices}
        for path in paths:
            chips = [chip for chip in self._devices if self._has(chip, path)]
            for chip, part in self.parts(weights, path, chips).items():
                packed[chip].append(self._packed(chip, part, weight_format, self._backend, is_gated))
        return self._joined(packed, self._experts_each if "experts" in paths[0] else 1)

    def matrix(self, parts: dict[Chip, np.ndarray], weight_format: str, backend: str) -> Any:
        """One matrix, as a layer of its own."""
        packed = {
            chip: [self._packed(chip, part, weight_format, backend, False)] for chip, part in parts.items()
        }
        return self._joined(packed)

    def vectors(self, weights: WeightReader, paths: Sequence[Path]) -> jax.Array:
        """One vector a layer, stacked; of fsdp every chip has all."""
        stacked: dict[Chip, list[np.ndarray]] = {chip: [] for chip in self._devices}
        for path in paths:
            for chip, vector in self.parts(weights, path).items():
                stacked[chip].append(vector)
        return self._joined_vectors({chip: np.stack(rows) for chip, rows in stacked.items()})

    def vector(self, weights: WeightReader, path: Path) -> jax.Array:
        return self._joined_vectors(self.parts(weights, path))

    def parts(
        self, weights: WeightReader, path: Path, chips: Sequence[Chip] | None = None
    ) -> dict[Chip, np.ndarray]:
        """Of an array the part of each chip here; where others have the rest, no more is read than that."""
        chips = list(self._devices) if chips is None else chips
        cuts = {tensor: self._split.cut(path, tensor) for _, tensor in chips}
        if 0 < len(cuts) < self._split.num_chips and None not in cuts.values():
            read = {tensor: weights.read_part(path, cut) for tensor, cut in cuts.items() if cut is not None}
        elif cuts:
            whole = weights.read(path)
            read = {tensor: whole if cut is None else cut.of(whole) for tensor, cut in cuts.items()}
        else:
            return {}
        return {(expert, tensor): read[tensor] for expert, tensor in chips}

    def _has(self, chip: Chip, path: Path) -> bool:
        if "experts" not in path:
            return True
        return int(path[path.index("experts") + 1]) // self._experts_each == chip[0]

    def _packed(
        self, chip: Chip, part: np.ndarray, weight_format: str, backend: str, is_gated: bool
    ) -> PackedWeights:
        """A matrix packed: on the host for the native backend, which keeps all layers in one array; as pieces
        on the devices otherwise."""
        place = np.asarray if backend == "cpu" else partial(self._put_parts, chip, axis=0)
        return pack_weights([part], weight_format, backend, is_gated=is_gated, to_device=place)

    def _joined(self, packed: dict[Chip, list[PackedWeights]], num_each: int = 1) -> Any:
        """The matrices of each chip, `num_each` a layer, as one `PackedWeights` of global arrays, or
        `GatheredWeights`."""
        layers = next(iter(packed.values()))
        meta = replace(layers[0].meta, num_layers=len(layers))
        if meta.backend == "cpu":
            placed = [
                {
                    chip: self._put_parts(chip, np.concatenate([each.arrays[index] for each in own]), axis=1)
                    for chip, own in packed.items()
                }
                for index in range(len(layers[0].arrays))
            ]
            arrays = tuple(self._global(each) for each in placed)
        else:
            placed = []
            for layer in range(len(layers)):
                by_array = zip(*(own[layer].arrays[0] for own in packed.values()), strict=True)
                placed.append([dict(zip(packed, pieces, strict=True)) for pieces in by_array])
            arrays = tuple(tuple(self._global(each) for each in of_layer) for of_layer in placed)
            placed = placed[0]
        if self._parts == 1:
            return PackedWeights(arrays, meta)
        sizes = tuple(next(iter(each.values())).size for each in placed)
        return GatheredWeights(arrays, meta, sizes, num_each)

    def _joined_vectors(self, vectors: dict[Chip, np.ndarray]) -> jax.Array:
        put = {
            chip: _Placed([jax.device_put(vector, device) for _, device in self._devices[chip]], len(vector))
            for chip, vector in vectors.items()
        }
        return self._global(put, (EXPERT_AXIS, TENSOR_AXIS))

    def _global(
        self,
        placed: dict[Chip, _Placed],
        axes: tuple[str, ...] = (WEIGHTS_AXIS, EXPERT_AXIS, TENSOR_AXIS),
    ) -> jax.Array:
        """The global array of the chips' pieces, which differ along `axes`."""
        pieces = [piece for each in placed.values() for piece in each.pieces]
        shape = pieces[0].shape
        num_blocks = int(np.prod([self._mesh.shape[axis] for axis in axes]))
        sharding = NamedSharding(self._mesh, PartitionSpec(axes))
        return jax.make_array_from_single_device_arrays((num_blocks * shape[0], *shape[1:]), sharding, pieces)

    def _put_parts(self, chip: Chip, array: np.ndarray, axis: int) -> _Placed:
        """Cut along `axis` for the fsdp axis, the last part filled up, and put on the chips of `chip`."""
        size, count = array.shape[axis], self._parts
        each = -(-size // count)
        if each * count > size:
            padding = [(0, 0)] * array.ndim
            padding[axis] = (0, each * count - size)
            array = np.pad(array, padding)
        parts = np.split(array, count, axis)
        return _Placed([jax.device_put(parts[part], device) for part, device in self._devices[chip]], size)


@dataclass(frozen=True, slots=True)
class _Placed:
    """An array's pieces on this process's devices."""

    pieces: list[jax.Array]
    size: int
    """Of the axis that was cut, before it was filled up."""
