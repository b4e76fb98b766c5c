"""Calls of the kernels: through Triton on a GPU, and interpreted where a test asks for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_is_interpreted = ContextVar("is_interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """What is traced inside runs on any machine: the kernels' own operations, one thread block at a time."""
    before = _is_interpreted.set(True)
    try:
        yield
    finally:
        _is_interpreted.reset(before)


def call_kernel(
    kernel: Callable[..., None],
    *inputs: Any,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    warps: int,
    stages: int = 1,
    aliases: Mapping[int, int] | None = None,
) -> Any:
    """Run `kernel(*inputs, output)` for each index of the grid; it is given references to whole arrays.

    inputs, out_shape: pytrees of arrays, and the one of the output.
    warps, stages: see `tiles.Tile`.
    aliases: {index of an input: index of the output that takes its memory}, arrays of the pytrees counted in
        order.
    """
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=(out_shape,),  # one output, whatever it is: a tuple's would be taken apart
        input_output_aliases=dict(aliases or {}),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=_is_interpreted.get(),
        name=name,
    )(*inputs)[0]


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
