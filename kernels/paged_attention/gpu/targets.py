"""Compiling for an NVIDIA GPU on a machine that has none: XLA's plugin for CUDA holds the compiler.

It is told the chip's numbers, and takes `ptxas` and device functions from the package nvidia-cuda-nvcc-cu12.
No choice between algorithms is measured so, which concerns XLA's own products and not the kernels here.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh


@dataclass(frozen=True, slots=True)
class Target:
    """A chip as CUDA describes it; bytes, and hertz."""

    name: str
    major: int
    num_cores: int
    units_per_core: int
    """Of float32 arithmetic."""
    shared_of_core: int
    shared_of_block: int
    memory: int
    bandwidth: int
    l2: int
    clock: float

    @property
    def architecture(self) -> str:
        """As `ptxas` names it; with the instructions that only this one has, from sm_90 on."""
        return f"sm_{self.major}0{'a' if self.major >= 9 else ''}"

    def description(self) -> str:
        """The text form of XLA's `GpuTargetConfigProto`."""
        feature = "feature_extension: ACCELERATED_FEATURES" if self.major >= 9 else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
              shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_of_core}
              shared_memory_per_block_optin: {self.shared_of_block}
              core_count: {self.num_cores}  fpus_per_core: {self.units_per_core}
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
              memory_bandwidth: {self.bandwidth}  l2_cache_size: {self.l2}
              clock_rate_ghz: {self.clock / 1e9}  device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {self.major} minor: 0 {feature} }}
              runtime_version: "12.9.0"  driver_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"
              name: "{self.name}"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


_KIB, _MIB = 2**10, 2**20
TARGETS = {
    "A100": Target(
        "NVIDIA A100-SXM4-80GB",
        major=8,
        num_cores=108,
        units_per_core=64,
        shared_of_core=164 * _KIB,
        shared_of_block=163 * _KIB,
        memory=80 * 10**9,
        bandwidth=2039 * 10**9,
        l2=40 * _MIB,
        clock=1.41e9,
    ),
    "H100": Target(
        "NVIDIA H100 80GB HBM3",
        major=9,
        num_cores=132,
        units_per_core=128,
        shared_of_core=228 * _KIB,
        shared_of_block=227 * _KIB,
        memory=80 * 10**9,
        bandwidth=3350 * 10**9,
        l2=50 * _MIB,
        clock=1.98e9,
    ),
}
TARGETS["H200"] = replace(TARGETS["H100"], name="NVIDIA H200", memory=141 * 10**9, bandwidth=4800 * 10**9)
_PACKAGES = {"jax_plugins.xla_cuda12": "jax-cuda12-pjrt", "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12"}


def missing() -> str | None:
    """What compiling lacks, in one line; None where it lacks nothing."""
    for module, package in _PACKAGES.items():
        if _find(module) is None:
            return f"{package} is absent: install the extra gpu-compile"
    return None


def _find(module: str) -> Path | None:
    """The folder of an installed module that need not be imported for it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even what it lies in is there
        return None
    folders = None if spec is None else spec.submodule_search_locations
    return None if not folders else Path(folders[0])


def tool(name: str) -> Path:
    """A program of CUDA's: `ptxas`. Raises RuntimeError where it is not installed."""
    folder = _find("nvidia.cuda_nvcc")
    if folder is None:
        raise RuntimeError(missing())
    return folder / "bin" / name


def prepare(dump_folder: Path | None = None) -> None:
    """Compile without looking for a GPU; and tell XLA where to write the kernels' code, if anywhere.

    Call it before JAX is first used, in a process of its own.
    """
    jax.config.update("jax_platforms", "cpu")
    if dump_folder is not None:
        jax.config.update("jax_enable_compilation_cache", False)  # what it holds is not compiled again
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump_folder}"


def slice_devices(chip: str, count: int = 1) -> list[Any]:
    """So many of such devices on one machine. Raises what XLA raises when it cannot compile for them."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=TARGETS[chip].description()
    )
    return list(topology.devices)


def one_device_mesh(chip: str) -> Mesh:
    """A mesh of one such device."""
    return Mesh(np.array(slice_devices(chip)), ("device",))
