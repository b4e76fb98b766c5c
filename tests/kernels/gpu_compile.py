"""Compiles the kernels for one GPU: `python -m tests.kernels.gpu_compile CHIP CASE...`, a JSON line a case.

A case is SHAPE:DTYPE[:option]. In a process of its own, because XLA reads its environment once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from kernels.paged_attention import pallas_gpu
from kernels.paged_attention.gpu.layout import GpuPageLayout
from kernels.paged_attention.gpu.targets import one_device_mesh, prepare
from kernels.paged_attention.model_shapes import MODEL_SHAPES, step_arguments
from kernels.paged_attention.tpu.topology import compile_for
from tests.kernels.tpu_compile import OPTIONS


def main(chip: str, *cases: str) -> None:
    prepare()
    mesh = one_device_mesh(chip)
    for case in cases:
        name, dtype, option = f"{case}:".split(":")[:3]
        shape = MODEL_SHAPES[name]
        layout = GpuPageLayout("pallas_gpu", shape.num_kv_heads, shape.head_dim, 64, np.dtype(dtype))
        options = replace(shape.options, **OPTIONS[option])
        sinks = jax.ShapeDtypeStruct((shape.num_heads,), jnp.float32) if option == "window" else None
        arguments = (*step_arguments(shape, layout), sinks)

        def call(q, k, v, pages, rows, groups, sinks, options=options, layout=layout):
            return pallas_gpu.attend(q, k, v, pages, rows, groups, options, layout, sinks)

        memory = compile_for(mesh, call, arguments, donate_argnums=3).memory_analysis()
        pages = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[3]))
        print(json.dumps({"case": case, "pages": pages, "alias": memory.alias_size_in_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
