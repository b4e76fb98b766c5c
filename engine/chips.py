"""Accelerators as a plan needs to know them: memory, peak rates, links, and the slices they are rented in.

Sources. TPUs: the "System architecture" tables of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; usable
memory as libtpu 0.0.52 says it when a program does not fit ("exceeds available HBM (30.75G)"). GPUs: NVIDIA's
data sheets of the A100 80GB SXM, H100 SXM and H200 SXM, dense rates; usable memory about as CUDA reports it.
All are what a vendor promises, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Chip:
    """One kind of chip. Rates are of a whole chip, in operations and bytes a second."""

    name: str
    platform: str
    """As `engine.platform` names it."""
    kinds: tuple[str, ...]
    """What a JAX device of it calls itself; of a GPU how that begins."""
    memory_bytes: int
    usable_bytes: int
    """What JAX may use of it, after what the system keeps."""
    bf16_flops: float
    f32_flops: float
    """Of products in full float32: on a TPU six passes of bfloat16, on a GPU its vector units."""
    memory_rate: float
    link_rate: float
    """Of one link to a neighbour, one way."""
    slices: Mapping[int, tuple[int, ...]]
    """Chips along each axis of the slices there are, by the number in the slice's name."""
    ring_length: int = 0
    """An axis this long is a ring, with two links a chip (of three axes all must be so long); 0: none is."""
    devices: int = 1
    """JAX devices that a chip shows itself as; memory and rates are shared evenly."""

    def is_kind(self, device_kind: str) -> bool:
        """Whether a JAX device of this kind is of this chip."""
        return device_kind.startswith(self.kinds) if self.platform == "gpu" else device_kind in self.kinds

    def flops(self, dtype: str) -> float:
        """The peak rate of products of this dtype of activations."""
        return self.f32_flops if dtype == "float32" else self.bf16_flops


@dataclass(frozen=True, slots=True)
class Slice:
    """Chips that are rented together, joined by links along `axes`."""

    name: str
    chip: Chip
    axes: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.axes)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def usable_bytes(self) -> int:
        """Of one device."""
        return self.chip.usable_bytes // self.chip.devices

    @property
    def memory_rate(self) -> float:
        """Of one device, bytes a second."""
        return self.chip.memory_rate / self.chip.devices

    def flops(self, dtype: str) -> float:
        """Of one device."""
        return self.chip.flops(dtype) / self.chip.devices

    @property
    def exchange_rate(self) -> float:
        """Bytes a second that one chip sends to its neighbours over all links that the slice has.

        An axis of two chips is one link. A longer one is a line, whose ends have one link and hold up the
        others, until it is a ring.
        """
        rings = [0 < self.chip.ring_length <= length for length in self.axes]
        if len(self.axes) == 3:
            rings = [all(rings)] * 3
        links = sum(
            2 if is_ring else 1 for length, is_ring in zip(self.axes, rings, strict=True) if length > 1
        )
        return self.chip.link_rate * links


# The number in the name of a slice of v4, v5p and 7x counts TensorCores, of which a chip has two.
_CUBES = {8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8)}
_SQUARES = {1: (1,), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
# One machine's, all joined by NVLink through a switch.
_BOARDS = {1: (1,), 2: (2,), 4: (4,), 8: (8,)}
# JAX takes three quarters of a GPU's memory unless XLA_CLIENT_MEM_FRACTION says otherwise.
_GPU_SHARE = 0.75
_FULL_PRECISION_PASSES = 6


def _tpu(
    name: str,
    *kinds: str,
    memory: float,
    usable: float,
    tera_flops: float,
    giga_bytes: float,
    link: float,
    slices: Mapping[int, tuple[int, ...]],
    ring_length: int,
    devices: int = 1,
) -> Chip:
    """Memory in GiB, rates in 10^12 operations and 10^9 bytes a second."""
    return Chip(
        name,
        "tpu",
        kinds,
        int(memory * GIB),
        int(usable * GIB),
        tera_flops * 1e12,
        tera_flops * 1e12 / _FULL_PRECISION_PASSES,
        giga_bytes * 1e9,
        link * 1e9,
        slices,
        ring_length,
        devices,
    )


def _gpu(
    name: str,
    kind: str,
    *,
    memory: float,
    usable: float,
    tera_flops: float,
    f32: float,
    giga_bytes: float,
    link: float,
) -> Chip:
    return Chip(
        name,
        "gpu",
        (kind,),
        int(memory * GIB),
        int(usable * _GPU_SHARE * GIB),
        tera_flops * 1e12,
        f32 * 1e12,
        giga_bytes * 1e9,
        link * 1e9,
        _BOARDS,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        # 2,400 Gbit/s over six links; a torus from a cube of four on.
        _tpu("v4", "TPU v4", memory=32, usable=30.75, tera_flops=275, giga_bytes=1200, link=50,
             slices=_CUBES, ring_length=4),
        # 400 GB/s both ways over four links.
        _tpu("v5e", "TPU v5 lite", "TPU v5e", memory=16, usable=15.75, tera_flops=197,
             giga_bytes=819, link=50, slices=_SQUARES, ring_length=16),
        # 1,200 GB/s both ways over six links.
        _tpu("v5p", "TPU v5p", "TPU v5", memory=95.9, usable=95.73, tera_flops=459, giga_bytes=2765, link=100,
             slices=_CUBES, ring_length=4),
        # 800 GB/s both ways over four links.
        _tpu("v6e", "TPU v6 lite", "TPU v6e", memory=32, usable=31.24, tera_flops=918,
             giga_bytes=1638, link=100, slices=_SQUARES, ring_length=16),
        # 1,200 GB/s both ways over six links; each half of a chip is a device.
        _tpu("tpu7x", "TPU7x", "TPU v7x", memory=192, usable=189.48, tera_flops=2307, giga_bytes=7380,
             link=100, slices=_CUBES, ring_length=4, devices=2),
        _gpu("a100", "NVIDIA A100", memory=80, usable=79.2, tera_flops=312, f32=19.5,
             giga_bytes=2039, link=300),
        _gpu("h100", "NVIDIA H100", memory=80, usable=79.2, tera_flops=989, f32=67,
             giga_bytes=3350, link=450),
        _gpu("h200", "NVIDIA H200", memory=141, usable=139.8, tera_flops=989, f32=67,
             giga_bytes=4800, link=450),
    )
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a JAX device of this kind is of, if the table has it."""
    return next((chip for chip in CHIPS.values() if chip.is_kind(device_kind)), None)


def find_slice(name: str) -> Slice:
    """The slice of a name such as `v4-8`, `v5e-1` or `h100-8`. Raises ConfigError, naming those there are."""
    chip_name, _, number = name.partition("-")
    chip = CHIPS.get(chip_name)
    if chip is None:
        raise ConfigError(f"plan.topology={name!r}: no chip {chip_name!r}; there are {', '.join(CHIPS)}")
    if not number.isdigit() or int(number) not in chip.slices:
        known = ", ".join(f"{chip_name}-{each}" for each in chip.slices)
        raise ConfigError(f"plan.topology={name!r}: choose one of {known}")
    return Slice(name, chip, chip.slices[int(number)])


def slices_of(chip: Chip) -> list[Slice]:
    """All slices of a chip, the smallest first."""
    return [find_slice(f"{chip.name}-{number}") for number in chip.slices]
