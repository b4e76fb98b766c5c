"""How a page lies on a TPU: [P, K, page, W], a token's key and value of one head side by side in a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.paged_attention.layout import PageLayout, Rows, quantised

LANES = 128


class TpuPages(NamedTuple):
    """One layer's pages. int8 pages have scales: what is stored times its scale is the value.

    fp8 pages have none: their relative error does not depend on the size of what they hold.
    """

    rows: jax.Array  # [P, K, page, W]
    scales: jax.Array | None = None  # f32[P, 2, K, page], of keys and of values

    @property
    def num_pages(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True, slots=True)
class TpuPageLayout(PageLayout):
    """Pages as the TPU's tiles want them: the last axis a multiple of 128 lanes, tokens in the one before.

    A head dim of up to 64 shares its 128 lanes with the value, so nothing is read for nothing; a longer one
    is padded to whole vectors of 128. KV heads are an outer axis, so any number of them is laid out alike.
    """

    @property
    def is_shared(self) -> bool:
        """A key and its value share one vector of lanes."""
        return self.head_dim <= LANES // 2

    @property
    def operand_width(self) -> int:
        """Lanes of a row that one product reads."""
        return -(-self.head_dim // LANES) * LANES

    @property
    def row_width(self) -> int:
        return LANES if self.is_shared else 2 * self.operand_width

    @property
    def value_lane(self) -> int:
        """Where a row's value begins."""
        return self.row_width // 2

    @property
    def value_operand(self) -> int:
        """Where the lanes begin that the product with the values reads."""
        return 0 if self.is_shared else self.value_lane

    @property
    def sublanes(self) -> int:
        """Rows of one tile of this dtype: what is written to a page is written in whole tiles."""
        return 8 * (4 // self.dtype.itemsize)

    @property
    def page_bytes(self) -> int:
        scales = 8 * self.num_kv_heads * self.page_size if self.has_scales else 0
        return self.num_kv_heads * self.page_size * self.row_width * self.dtype.itemsize + scales

    def empty(self, num_pages: int) -> TpuPages:
        """New pages of zeros."""
        shape = (num_pages, self.num_kv_heads, self.page_size, self.row_width)
        rows = jnp.zeros(shape, self.dtype)
        if not self.has_scales:
            return TpuPages(rows)
        return TpuPages(rows, jnp.zeros((num_pages, 2, self.num_kv_heads, self.page_size), jnp.float32))

    def packed_rows(self, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Keys and values [T, K, H] as rows [T, K, W] in the pages' dtype, and their scales f32[T, 2, K]."""
        scales = None
        if self.has_scales:
            keys, key_scales = quantised(keys)
            values, value_scales = quantised(values)
            scales = jnp.stack([key_scales, value_scales], axis=1)
        pad = ((0, 0), (0, 0), (0, self.value_lane - self.head_dim))
        return jnp.concatenate([jnp.pad(self._stored(x), pad) for x in (keys, values)], -1), scales

    def _stored(self, x: jax.Array) -> jax.Array:
        """x in the pages' dtype. fp8 has no infinity: what lies beyond its range becomes its largest."""
        if self.dtype == jnp.float8_e4m3fn:
            largest = float(jnp.finfo(self.dtype).max)
            x = jnp.clip(x, -largest, largest)
        return x.astype(self.dtype)

    def write(self, pages: TpuPages, keys: jax.Array, values: jax.Array, rows: Rows) -> TpuPages:
        """Store the step's new keys and values (each [T, K, H]) by a scatter, without the kernel."""
        packed, scales = self.packed_rows(keys, values)
        page, offset = self.token_places(rows, keys.shape[0], pages.num_pages)
        pages = self.write_scales(pages, scales, page, offset)
        return pages._replace(rows=pages.rows.at[page, :, offset].set(packed, mode="drop"))

    def write_scales(
        self, pages: TpuPages, scales: jax.Array | None, page: jax.Array, offset: jax.Array
    ) -> TpuPages:
        if scales is None or pages.scales is None:
            return pages
        return pages._replace(scales=pages.scales.at[page, :, :, offset].set(scales, mode="drop"))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def copy(self, pages: TpuPages, source: jax.Array, target: jax.Array, num_tokens: jax.Array) -> TpuPages:
        """Copy the first `num_tokens` tokens of page `source` into page `target` (scalars, i32)."""
        kept = jnp.arange(self.page_size) < num_tokens

        def copied(x: jax.Array, mask: jax.Array) -> jax.Array:
            return x.at[target].set(jnp.where(mask, x[source], x[target]))

        rows = copied(pages.rows, kept[None, :, None])
        return TpuPages(rows, None if pages.scales is None else copied(pages.scales, kept[None, None]))

    def tokens(self, pages: TpuPages, page_ids: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, each [num_tokens, K, H], of a sequence that lies in `page_ids` (on the host)."""
        rows = np.asarray(pages.rows)[page_ids].transpose(0, 2, 1, 3)
        parts = []
        for index in range(2):
            begin = index * self.value_lane
            part = rows[..., begin : begin + self.head_dim]
            if pages.scales is not None:
                part = part * np.asarray(pages.scales)[page_ids, index].transpose(0, 2, 1)[..., None]
            parts.append(part.reshape(-1, self.num_kv_heads, self.head_dim)[:num_tokens])
        return parts[0], parts[1]
