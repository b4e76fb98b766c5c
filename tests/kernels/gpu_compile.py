"""Compiles the kernels for one GPU: `python -m tests.kernels.gpu_compile CHIP CASE...`, a JSON line a case.

A case is SHAPE:DTYPE:PAGE_SIZE[:option]. In a process of its own, because XLA reads its environment once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np

from kernels.paged_attention import pallas_gpu
from kernels.paged_attention.ahead_of_time import compile_for
from kernels.paged_attention.gpu.assembly import assemble
from kernels.paged_attention.gpu.layout import GpuPageLayout
from kernels.paged_attention.gpu.targets import TARGETS, one_device_mesh, prepare
from kernels.paged_attention.gpu.tuning import shared_bytes
from kernels.paged_attention.model_shapes import MODEL_SHAPES, step_arguments
from tests.kernels.tpu_compile import OPTIONS


def main(chip: str, *cases: str) -> None:
    with TemporaryDirectory() as folder:
        prepare(Path(folder))
        mesh = one_device_mesh(chip)
        for case in cases:
            print(json.dumps({"case": case} | _compiled(chip, mesh, case, Path(folder))))
            for path in Path(folder).iterdir():
                path.unlink()


def _compiled(chip, mesh, case, folder):
    name, dtype, page_size, option = f"{case}:".split(":")[:4]
    shape = MODEL_SHAPES[name]
    layout = GpuPageLayout("pallas_gpu", shape.num_kv_heads, shape.head_dim, int(page_size), np.dtype(dtype))
    options = replace(shape.options, **OPTIONS[option])
    arguments = step_arguments(shape, layout)
    sinks = jax.ShapeDtypeStruct((shape.num_heads,), jnp.float32) if option == "window" else None

    def call(sinks, *arguments):
        return pallas_gpu.attend(*arguments, options=options, layout=layout, sinks=sinks)

    memory = compile_for(mesh, call, (sinks, *arguments), donate_argnums=4).memory_analysis()
    with jax.sharding.set_mesh(mesh):
        tiles = pallas_gpu.shape_of(*arguments, options, layout).tiles
    kernels = assemble(folder, TARGETS[chip].architecture, "paged_attention_")
    return {
        "pages": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[3])),
        "alias": memory.alias_size_in_bytes,
        "kernels": {each.name.removeprefix("paged_attention_"): asdict(each) for each in kernels},
        "shared": {kind: shared_bytes(getattr(tiles, kind), layout) for kind in ("decode", "group", "chunk")},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
