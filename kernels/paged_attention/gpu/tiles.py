"""Tile sizes of the kernels, and the shared memory that they take."""

from __future__ import annotations

from dataclasses import dataclass

_LEAST = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """What one thread block of a kernel has in hand.

    rows: queries times query heads of one KV head, a power of two from 16 on.
    keys: keys and values that are read and computed at once, a power of two from 16 on.
    warps: of 32 threads, a power of two up to 16.
    stages: how many tiles of keys and values are on their way or in use, from 1 (each is waited for) to 8.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, least, most in (("rows", _LEAST, 256), ("keys", _LEAST, 256), ("warps", 1, 16)):
            value = getattr(self, name)
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"Tile.{name} is {value}: give a power of two from {least} to {most}")
        if not 1 <= self.stages <= 8:
            raise ValueError(f"Tile.stages is {self.stages}: give 1 to 8")

    def shared_bytes(self, vector: int, stored_bytes: int, computed_bytes: int, num_scales: int) -> int:
        """Most bytes of shared memory that a thread block takes.

        vector: numbers of a head's vector, padded to a power of two.
        stored_bytes, computed_bytes: of one such number in its page, and in products.
        num_scales: numbers of 4 bytes that come with each token's key and value.

        Keys and values are kept for each stage; the queries, and the weights of the tile, once, as operands
        of products; and the numbers that warps exchange for a row's maximum and sum.
        """
        a_stage = self.keys * (2 * vector * stored_bytes + 4 * num_scales)
        widened = 2 * self.keys * vector * computed_bytes if stored_bytes != computed_bytes else 0
        operands = self.rows * (vector + self.keys) * computed_bytes
        return self.stages * a_stage + widened + operands + 4 * self.rows * self.warps


@dataclass(frozen=True, slots=True)
class TileSizes:
    """A tile for each kind of work of a step.

    decode: one sequence's one query, to a part of its own keys.
    group: the queries of several decodes, to a part of the keys that they share.
    chunk: queries of one prefill chunk, to all keys before them.
    """

    decode: Tile
    group: Tile
    chunk: Tile
