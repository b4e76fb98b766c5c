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
    return Machine(
        cpu=cpu_name(),
        num_cores=len(os.sched_getaffinity(0)),
        matrix_gflops=max(_numpy_gflops(), _jax_gflops()),
        memory_gbs=_memory_gbs(),
        device=jax.devices()[0].device_kind,
        load_average=load_average,
        busy_processes=busy,
    )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def busy_processes(seconds: float = 0.5, share: float = 0.2) -> tuple[str, ...]:
    """Other processes that use more than `share` of a core, and so spoil a measurement: pid, name, cores."""
    before = _cpu_seconds()
    time.sleep(seconds)
    used = {
        pid: (name, (now - before[pid][1]) / seconds)
        for pid, (name, now) in _cpu_seconds().items()
        if pid in before
    }
    busy = [(cores, pid, name) for pid, (name, cores) in used.items() if cores > share and pid != os.getpid()]
    return tuple(f"{pid} {name} {cores:.1f} cores" for cores, pid, name in sorted(busy, reverse=True)[:8])


class OthersMeter:
    """How many cores everything but the given processes uses, from when it is made."""

    def __init__(self, *own_pids: int):
        self._own_pids = own_pids
        self._started = time.perf_counter()
        self._before = self._others()

    def cores(self) -> float:
        """The mean so far; what the hypervisor gave to other machines counts too."""
        return max(0.0, self._others() - self._before) / (time.perf_counter() - self._started)

    def _others(self) -> float:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = _cpu_seconds()
        return busy - sum(own[pid][1] for pid in self._own_pids)


def _cpu_seconds() -> dict[int, tuple[str, float]]:
    """(name, processor seconds used so far) of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            head, _, fields = (folder / "stat").read_text().rpartition(") ")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        user, system = fields.split()[11:13]
        found[int(folder.name)] = (
            head.partition("(")[2],
            (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"),
        )
    return found


def _best_seconds(run: Callable[[], object]) -> float:
    run()
    best = float("inf")
    for _ in range(_TRIES):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


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
