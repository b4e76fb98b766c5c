"""Compiles the kernel for one chip: `python -m tests.kernels.tpu_compile CHIP CASE...`, a JSON line a case.

A case is SHAPE:DTYPE[:option]. In a process of its own, because libtpu reads its environment once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels.paged_attention import pallas_tpu
from kernels.paged_attention.ahead_of_time import compile_for
from kernels.paged_attention.model_shapes import MODEL_SHAPES, step_arguments
from kernels.paged_attention.tpu.layout import TpuPageLayout
from kernels.paged_attention.tpu.topology import one_device_mesh, prepare

OPTIONS = {"": {}, "chunk": {"chunk": 8192}, "window": {"window": 1024}, "soft_cap": {"soft_cap": 50.0}}


def main(chip: str, *cases: str) -> None:
    prepare(chip)
    mesh = one_device_mesh(chip)
    for case in cases:
        name, dtype, option = f"{case}:".split(":")[:3]
        shape = MODEL_SHAPES[name]
        layout = TpuPageLayout("pallas_tpu", shape.num_kv_heads, shape.head_dim, 64, np.dtype(dtype))
        function = partial(
            pallas_tpu.attend, options=replace(shape.options, **OPTIONS[option]), layout=layout
        )
        sinks = jax.ShapeDtypeStruct((shape.num_heads,), jnp.float32) if option == "window" else None
        arguments = (*step_arguments(shape, layout), sinks)

        def call(q, k, v, pages, rows, groups, sinks, function=function):
            return function(q, k, v, pages, rows, groups, sinks=sinks)

        memory = compile_for(mesh, call, arguments, donate_argnums=3).memory_analysis()
        pages = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[3]))
        print(json.dumps({"case": case, "pages": pages, "alias": memory.alias_size_in_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
