"""Compiling for devices that need not be there: a TPU's (`tpu.topology`) or a GPU's (`gpu.targets`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def on_mesh(mesh: Mesh, arguments: Any) -> Any:
    """Shapes of arguments, placed: those that are not yet go to every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        is_placed = isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
        return x if is_placed else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    return jax.tree.map(placed, arguments)


def compile_for(mesh: Mesh, function: Callable[..., Any], arguments: Any, **jit_options: Any) -> Any:
    """`function` compiled for the mesh's device, for `arguments` (arrays or their shapes, as a tuple)."""
    with jax.sharding.set_mesh(mesh):  # tells Pallas the chip that it compiles for
        return jax.jit(function, **jit_options).lower(*on_mesh(mesh, arguments)).compile()
