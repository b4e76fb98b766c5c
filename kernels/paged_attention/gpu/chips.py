"""What the kernels need to know of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True)
class Chip:
    """One kind of GPU. Numbers are those of CUDA's device attributes."""

    name: str
    num_cores: int
    """Streaming multiprocessors."""
    shared_bytes: int
    """Most shared memory of one thread block."""
    has_warp_groups: bool
    """Products of 64 rows and more run on warp groups, with operands in shared memory (sm_90)."""
    has_fp8: bool
    """It converts float8_e4m3fn (from sm_89 on)."""


# The least that any GPU with bfloat16 products has (sm_86, sm_89 and sm_120).
OTHER = Chip("another GPU", 64, 99 * 1024, False, False)
CHIPS = (
    Chip("A100", 108, 163 * 1024, False, False),
    Chip("H100", 132, 227 * 1024, True, True),
    Chip("H200", 132, 227 * 1024, True, True),
)


def chip_of(device_kind: str) -> Chip:
    """The chip that JAX calls `device_kind` ("NVIDIA H100 80GB HBM3"); `OTHER` where that is none of them."""
    return next((chip for chip in CHIPS if chip.name in device_kind), OTHER)


def current_chip() -> Chip:
    """The chip that is compiled for: that of the mesh in `jax.sharding.set_mesh`, else JAX's first device."""
    compiled_for = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if compiled_for is None else compiled_for.device_kind
    return chip_of(kind)
