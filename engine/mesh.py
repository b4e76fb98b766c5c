"""The chips a model runs on, as a mesh of five axes, the outermost first.

    dp    replicas: each has all weights, and a scheduler and pages of its own
    fsdp  replicas that share one copy of the weights: each chip holds a part, which is gathered for use
    ep    experts of a mixture are split
    tp    heads, the MLP and the vocabulary are split
    sp    the tokens of one sequence are split

Neighbours in tp are neighbours in the list of devices: they exchange most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

AXES = ("dp", "fsdp", "ep", "tp", "sp")
REPLICA_AXES = ("dp", "fsdp")
"""Chips that differ in these have different requests."""
TENSOR_AXIS = "tp"
EXPERT_AXIS = "ep"
WEIGHTS_AXIS = "fsdp"


def mesh_shape(dims: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """`engine.sharding_axis_dims` with its -1, if there is one, as the rest of `num_devices`.

    Without a -1 the first devices are used, as many as asked for. Raises ConfigError, with the numbers, when
    they do not go together.
    """
    asked = f"engine.sharding_axis_dims={list(dims)} ({', '.join(AXES)})"
    fixed = math.prod(size for size in dims if size != -1)
    if fixed > num_devices:
        raise ConfigError(f"{asked} needs {fixed} devices, and JAX has {num_devices}: ask for fewer")
    if -1 in dims and num_devices % fixed:
        raise ConfigError(
            f"{asked}: {num_devices} devices are not a multiple of {fixed}, so -1 has no size; "
            f"give sizes whose product is {num_devices} or less"
        )
    shape = tuple(num_devices // fixed if size == -1 else size for size in dims)
    if shape[-1] > 1:
        raise ConfigError(
            f"{asked}: sp is {shape[-1]}, and splitting a sequence's tokens is not implemented; give 1"
        )
    return shape


def make_mesh(dims: Sequence[int]) -> Mesh | None:
    """The mesh of this process's platform; None where it has one device, and nothing is to be split.

    Of several processes all must ask for the same, and every device must be in the mesh. Raises ConfigError
    as `mesh_shape` does.
    """
    import jax  # late: a configuration is read without it

    devices = jax.devices()
    shape = mesh_shape(dims, len(devices))
    size = math.prod(shape)
    if size == 1 and jax.process_count() == 1:
        return None
    if size != len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"engine.sharding_axis_dims={list(dims)} uses {size} of the {len(devices)} devices of "
            f"{jax.process_count()} processes: each device of each process must be used"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices[:size]
    )
