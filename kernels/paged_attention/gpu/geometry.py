"""The static shapes that all kernels of a step share."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from kernels.paged_attention.gpu.layout import GpuPageLayout
from kernels.paged_attention.gpu.tiles import TileSizes
from kernels.paged_attention.layout import AttentionOptions

# Thread blocks for each core that a kernel should have at least: several run at once, and as they end at
# different times there should be more.
_BLOCKS_PER_CORE = 8
# Tokens of a part of a sequence's keys. A shorter one is not worth its merging; a longer one makes a step
# wait for one sequence.
_MIN_PART, _MAX_PART = 256, 8192


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of one call: `K` KV heads with `ratio` query heads each.

    A thread block has `tile.rows` rows: row `r` is query `r // ratio` of its queries, query head `r % ratio`
    of its KV head. Rows past the last whole query stay empty.
    """

    layout: GpuPageLayout
    ratio: int
    options: AttentionOptions
    tiles: TileSizes
    num_cores: int
    num_slots: int
    table_width: int
    num_tokens: int
    num_groups: int

    @property
    def num_kv_heads(self) -> int:
        return self.layout.num_kv_heads

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.ratio

    @property
    def vector(self) -> int:
        """Numbers of a head's vector in a tile: a power of two, as products have it, from 16 on."""
        return padded_vector(self.layout.head_dim)

    @property
    def compute_dtype(self) -> np.dtype:
        """Of the operands of products."""
        return compute_dtype(self.layout)

    @property
    def num_decodes(self) -> int:
        """Most sequences with one query that a step can have."""
        return min(self.num_slots, self.num_tokens)

    @property
    def num_chunk_blocks(self) -> int:
        """Most blocks of queries of prefill chunks: each chunk has two queries or more, and its last block
        may be only partly filled."""
        return self.num_tokens // self.chunk_queries + min(self.num_slots, self.num_tokens // 2)

    @property
    def chunk_queries(self) -> int:
        return self.tiles.chunk.rows // self.ratio

    @property
    def members(self) -> int:
        """Decodes of one block that shared keys are read for."""
        return self.tiles.group.rows // self.ratio

    @property
    def num_member_blocks(self) -> int:
        return -(-self.num_decodes // self.members)

    @property
    def span(self) -> int:
        """Most keys that one query sees, and those that are read with them."""
        bounds = [each for each in (self.options.window, self.options.chunk) if each is not None]
        return min(
            [self.table_width * self.layout.page_size, *(each + self.tiles.decode.keys for each in bounds)]
        )

    @property
    def num_parts(self) -> int:
        """Parts that a decode's own keys are read in, each by a thread block."""
        return self._parts(self.num_decodes)

    @property
    def part_len(self) -> int:
        """Tokens of one part, whole tiles."""
        keys = self.tiles.decode.keys
        return -(-self.span // (self.num_parts * keys)) * keys

    @property
    def num_group_parts(self) -> int:
        """Parts that the keys of a group are read in."""
        return self._parts(self.num_member_blocks)

    def _parts(self, num_blocks: int) -> int:
        to_fill = -(-_BLOCKS_PER_CORE * self.num_cores // (num_blocks * self.num_kv_heads))
        return max(-(-self.span // _MAX_PART), min(to_fill, -(-self.span // _MIN_PART)))


def padded_vector(head_dim: int) -> int:
    """The power of two from 16 on that holds a head's vector."""
    return max(16, 1 << (head_dim - 1).bit_length())


def compute_dtype(layout: GpuPageLayout) -> np.dtype:
    """Of the operands of products over such pages."""
    return np.dtype(jnp.float32 if layout.dtype == np.float32 else jnp.bfloat16)
