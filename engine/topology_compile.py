"""Compiles the real step of a planned model for chips that are not there, and reads what the compiler says.

libtpu is the whole compiler for TPUs (the extra `tpu-compile`), XLA's plugin for CUDA that for GPUs
(`gpu-compile`). They read their environment once, and libtpu ends the process when it meets what it does not
expect, so they run in a process of its own:
`python -m engine.topology_compile` takes a pickled `DevicePlan` and writes a line of JSON for each step.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax

from engine.backends import Backends
from engine.batch import BatchBuilder
from engine.buckets import Bucket
from engine.chips import Slice
from engine.device_plan import DevicePlan, buckets_of, layout_of
from engine.errors import ConfigError
from engine.models.config import attention_scale
from engine.placement import placement_on
from engine.platforms import mesh_of
from engine.replica_batch import ReplicaBatch
from kernels.paged_attention import AttentionOptions
from kernels.paged_attention.ahead_of_time import on_mesh
from kernels.paged_attention.gpu import targets as gpu
from kernels.paged_attention.tpu import topology as tpu


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """What the compiler says of one step on one device."""

    num_tokens: int
    num_logits: int
    num_pages: int
    temporary_bytes: int
    argument_bytes: int
    """Weights, pages and inputs as they lie on the chip."""
    compile_seconds: float


def why_not_compiled(plan: DevicePlan) -> str | None:
    """Why steps cannot be compiled for the plan's chip here; None when they can."""
    if plan.topology.chip.platform == "gpu":
        return gpu.missing()
    if not tpu.is_installed():
        return "libtpu is not installed: pip install 'tidemill[tpu-compile]'"
    return None


def _devices_of(topology: Slice) -> list[Any]:
    """To compile for. JAX has been prepared for them, and not used before."""
    if topology.chip.platform == "gpu":
        return gpu.slice_devices(topology.chip.name.upper(), topology.num_devices)
    return tpu.slice_devices(topology.chip.name, topology.axes)


def compile_steps(plan: DevicePlan, *, only_largest: bool = False) -> Iterator[CompiledStep]:
    """Compile the plan's steps, the largest first and for few pages, as the engine does to learn what fits;
    then, unless `only_largest`, every step for the pages that do. Steps come as they are done.

    Raises ConfigError with the compiler's words when one does not compile.
    """
    command = [sys.executable, "-m", "engine.topology_compile", *(["--only-largest"] if only_largest else [])]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # libtpu lets one process in at a time, for the sake of chips that this one does not touch.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    with tempfile.TemporaryFile() as said:  # a pipe that nobody reads would fill up and stop the compiler
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment
        )
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(BrokenPipeError):  # a child that ended at once says why below
                child.stdin.write(pickle.dumps(plan))
                child.stdin.close()
            for line in child.stdout:
                answer = json.loads(line)
                if "error" in answer:
                    raise ConfigError(f"{plan.topology.chip.name}: {answer['error']}")
                yield CompiledStep(**answer)
            child.wait()
        finally:  # whoever stops asking leaves no compiler behind
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        said.seek(0)
        words = said.read().decode(errors="replace")[-2000:].strip()
    if child.returncode:
        raise ConfigError(f"the compiler for {plan.topology.chip.name} ended: {words}")


class _Program:
    """A plan's step, on all devices of its mesh, ready to be compiled for any bucket and number of pages."""

    def __init__(self, plan: DevicePlan):
        config = plan.config
        backends = Backends.choose(config, plan.topology.chip.platform)
        self._layout = layout_of(plan.share, config, backends)
        self._num_layers = plan.share.num_layers
        self.buckets = buckets_of(config, backends)
        host = jax.devices()[0]
        self._mesh = mesh_of(_devices_of(plan.topology), tuple(plan.mesh.values()))
        place = placement_on(None if self._mesh.size == 1 else self._mesh, config, plan.model)
        self._place = place
        self._model = place.abstract_model(backends.linear)
        # Of a batch's arrays only the shapes are wanted, so they are made on the host.
        make_builder = partial(
            BatchBuilder,
            buckets=self.buckets,
            vocab_size=plan.model.vocab_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=plan.max_model_len,
            page_size=config.page_size,
            device=host,
            group_costs=None,
        )
        builders = [make_builder() for _ in range(place.num_replicas)]
        self._batch = ReplicaBatch(builders, host) if place.is_mesh else builders[0]
        from engine.runner import make_step

        options = AttentionOptions(scale=attention_scale(plan.model))
        self._step = place.jit_step(make_step(options, self._layout, backends.linear, place.sample))

    def compile(self, bucket: Bucket, num_pages: int) -> CompiledStep:
        started = time.monotonic()
        pages = self._place.abstract_pages(self._layout, self._num_layers * num_pages)
        arrays = self._batch.idle_arrays(bucket)
        arguments = on_mesh(self._mesh, (self._model, pages, arrays))
        with jax.sharding.set_mesh(self._mesh):  # tells Pallas the chip that it compiles for
            lowered = self._step.lower(self._batch.shape(bucket), *arguments)
        memory: Any = lowered.compile().memory_analysis()
        return CompiledStep(
            *bucket,
            num_pages,
            temporary_bytes=int(memory.temp_size_in_bytes),
            argument_bytes=int(memory.argument_size_in_bytes),
            compile_seconds=round(time.monotonic() - started, 1),
        )


def _steps(plan: DevicePlan, only_largest: bool) -> Iterator[CompiledStep]:
    program = _Program(plan)
    first = program.compile(program.buckets[-1], 2 * plan.config.max_num_seqs)
    yield first
    plan = replace(plan, temporary_bytes=first.temporary_bytes, is_estimate=False)
    if plan.fits and not only_largest:
        for bucket in program.buckets:
            yield program.compile(bucket, plan.num_pages)


def main(*arguments: str) -> None:
    plan: DevicePlan = pickle.loads(sys.stdin.buffer.read())  # from the process that started this one
    if plan.topology.chip.platform == "gpu":
        gpu.prepare()
    else:
        tpu.prepare(plan.topology.chip.name)
    try:
        for step in _steps(plan, "--only-largest" in arguments):
            print(json.dumps(asdict(step)), flush=True)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        print(json.dumps({"error": " ".join(str(error).split())[:1000]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
