"""Tile sizes of the kernel on each chip."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.paged_attention.tpu.layout import LANES


@dataclass(frozen=True, slots=True)
class TileSizes:
    """How much one turn of each loop takes.

    block: tokens of keys and values that are read and computed at once, a multiple of 128.
    decodes: decodes that share one pass over the pages of their groups, a multiple of 16.
    queries: queries of a prefill chunk that share one pass, a multiple of 16.
    """

    block: int = 512
    decodes: int = 64
    queries: int = 64

    def __post_init__(self) -> None:
        if self.block <= 0 or self.block % LANES:
            raise ValueError(f"TileSizes.block is {self.block}: give a multiple of {LANES}")
        for name in ("decodes", "queries"):
            value = getattr(self, name)
            if value <= 0 or value % 16:
                raise ValueError(f"TileSizes.{name} is {value}: give a multiple of 16")
