"""The static shapes that all parts of the kernel share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from kernels.paged_attention.layout import AttentionOptions
from kernels.paged_attention.tpu.layout import LANES, TpuPageLayout
from kernels.paged_attention.tpu.tiles import TileSizes

# Finite, so that a difference of two of them is a number. What is masked lies below any running maximum, so
# that its weight is zero even where nothing has been seen.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
UNSEEN = -1e30


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of one call: `K` KV heads with `ratio` query heads each.

    A decode's queries lie in `bundles` of `bundle_rows` sublanes, a multiple of 8: where a KV head has fewer
    than 8 queries, the queries of several share a bundle, each KV head's padded to `head_rows`.
    """

    layout: TpuPageLayout
    ratio: int
    options: AttentionOptions
    tiles: TileSizes
    num_slots: int
    table_width: int
    num_decodes: int
    num_tokens: int
    num_groups: int

    @property
    def num_kv_heads(self) -> int:
        return self.layout.num_kv_heads

    @property
    def head_rows(self) -> int:
        """Sublanes of one KV head's queries: a power of two below 8, or a multiple of 8."""
        if self.ratio > 8:
            return -(-self.ratio // 8) * 8
        return 1 << (self.ratio - 1).bit_length()

    @property
    def bundle_rows(self) -> int:
        return max(8, self.head_rows)

    @property
    def heads_per_bundle(self) -> int:
        return self.bundle_rows // self.head_rows

    @property
    def bundles(self) -> int:
        return -(-self.num_kv_heads // self.heads_per_bundle)

    @property
    def block(self) -> int:
        """Tokens of keys and values that are read and computed at once."""
        return self.tiles.block

    @property
    def pages_per_block(self) -> int:
        return self.block // self.layout.page_size

    @property
    def block_vectors(self) -> int:
        return self.block // LANES

    @property
    def member_rows(self) -> int:
        """Rows of one KV head in a block of decodes."""
        return self.tiles.decodes * self.head_rows

    @property
    def query_rows(self) -> int:
        """Rows of one KV head in a block of queries."""
        return self.tiles.queries * self.ratio

    @property
    def state_rows(self) -> int:
        return max(self.member_rows, self.query_rows)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32 if self.layout.dtype == jnp.float32 else jnp.bfloat16)

    @property
    def exponent(self) -> float:
        """exp(scaled logits) = 2 ** (exponent * what the running maximum is kept in)."""
        scale = self.options.scale if self.options.soft_cap is None else 1.0
        return scale * math.log2(math.e)
