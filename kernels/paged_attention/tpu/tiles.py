"""Tile sizes of the kernel on each chip."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.paged_attention.tpu.layout import LANES


@dataclass(frozen=True, slots=True)
class TileSizes:
    """How much one turn of each loop takes.

    block: tokens of keys and values that are read and computed at once, a power of two from 128 on.
    decodes: decodes that share one pass over the pages of their groups, a power of two from 16 on.
    queries: queries of a prefill chunk that share one pass, a multiple of 16.
    """

    block: int
    decodes: int
    queries: int

    def __post_init__(self) -> None:
        for name, least in (("block", LANES), ("decodes", 16)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"TileSizes.{name} is {value}: give a power of two from {least} on")
        if self.queries <= 0 or self.queries % 16:
            raise ValueError(f"TileSizes.queries is {self.queries}: give a multiple of 16")
