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
from collections.abc import Mapping, Sequence

from engine.errors import ConfigError

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
        raise ConfigError(f"{asked} needs {fixed} devices, and there are {num_devices}: ask for fewer")
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


def check_experts(num_experts: int, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError where a layer's experts cannot be put on a mesh of these sizes, by axis."""
    num_chips = sizes[EXPERT_AXIS]
    if num_chips > 1 and (num_experts == 0 or num_experts % num_chips):
        raise ConfigError(
            f"engine.sharding_axis_dims: ep is {num_chips}, and the model has {num_experts} experts a "
            "layer: give a number that divides them, or 1"
        )
