"""What this machine can do, measured in the same run, so that a rate can be read as a fraction."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from engine.platforms import quieten_libtpu
from jobs.bench.processes import busy_processes

_MATRIX_SIZE = 2048
_MEMORY_BYTES = 512 << 20
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """`matrix_gflops` is for float32 products, the better of numpy and JAX; `memory_gbs` for reading."""

    cpu: str
    num_cores: int
    matrix_gflops: float
    memory_gbs: float
    device: str
    load_average: float
    busy_processes: tuple[str, ...]


def measure_machine() -> Machine:
    """Takes some seconds. The load is read first, before this measurement adds to it."""
    load_average, busy = os.getloadavg()[0], busy_processes()
    quieten_libtpu()
    return Machine(
        cpu=cpu_name(),
        num_cores=len(os.sched_getaffinity(0)),
        matrix_gflops=max(_numpy_gflops(), _jax_gflops()),
        memory_gbs=_memory_gbs(),
        device=jax.devices()[0].device_kind,
        load_average=load_average,
        busy_processes=busy,
    )


def machine_lines(machine: Machine) -> list[str]:
    lines = [
        f"{machine.cpu}, {machine.num_cores} cores ({machine.device}): "
        f"{machine.matrix_gflops:.0f} GFLOP/s float32 products, {machine.memory_gbs:.1f} GB/s read",
    ]
    if machine.load_average > 0.5 or machine.busy_processes:
        busy = "; ".join(machine.busy_processes) or "none that stands out"
        lines.append(
            f"not alone: load average {machine.load_average:.1f} at the start, busy processes: {busy}"
        )
    return lines


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _best_seconds(run: Callable[[], object]) -> float:
    run()
    best = float("inf")
    for _ in range(_TRIES):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def copied_bytes_per_second(num_bytes: int) -> float:
    """Read and written by JAX's first device in copies of an array of `num_bytes`."""
    data = jnp.ones(num_bytes // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * data.nbytes / _best_seconds(lambda: copy(data).block_until_ready())


def product_operations_per_second(size: int, dtype: str) -> float:
    """Of JAX's first device in products of square matrices."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / _best_seconds(lambda: product(a).block_until_ready())


def _numpy_gflops() -> float:
    a = np.ones((_MATRIX_SIZE, _MATRIX_SIZE), np.float32)
    return 2 * _MATRIX_SIZE**3 / _best_seconds(lambda: a @ a) / 1e9


def _jax_gflops() -> float:
    a = jnp.ones((_MATRIX_SIZE, _MATRIX_SIZE), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    return 2 * _MATRIX_SIZE**3 / _best_seconds(lambda: product(a).block_until_ready()) / 1e9


def _memory_gbs() -> float:
    """Reading with all cores: sums of parts far larger than the caches, one thread a core."""
    data = np.ones(_MEMORY_BYTES // 4, np.float32)
    parts = np.array_split(data, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(len(parts)) as pool:
        # A maximum is one vector instruction a load; a float32 sum would be bound by its own additions.
        return data.nbytes / _best_seconds(lambda: list(pool.map(np.max, parts))) / 1e9
