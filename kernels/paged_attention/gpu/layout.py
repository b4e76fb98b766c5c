"""How a page lies on a GPU: keys and values alike [P, K, page, H], one token of one head after the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels.paged_attention.layout import PageLayout, Pages, Rows, quantised


@dataclass(frozen=True, slots=True)
class GpuPageLayout(PageLayout):
    """Pages whose heads are outside their tokens, so that a tile of one head's keys is a run of whole lines.

    A head's vector is not padded: where its length is no power of two, as Triton's tiles are, the kernels
    leave out what lies past its end, and memory moves nothing that is not there.
    """

    @property
    def is_fp8(self) -> bool:
        """Numbers of 8 bits with an exponent, which need no scales."""
        return self.dtype == jnp.float8_e4m3fn

    def empty(self, num_pages: int) -> Pages:
        """New pages of zeros."""
        shape = (num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        pages = Pages(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        if not self.has_scales:
            return pages
        key_scales, value_scales = (jnp.zeros(shape[:3], jnp.float32) for _ in range(2))
        return pages._replace(key_scales=key_scales, value_scales=value_scales)

    def packed(self, keys: jax.Array, values: jax.Array) -> Pages:
        """Keys and values [T, K, H] in the pages' dtype, and their scales f32[T, K], as `Pages` has them."""
        if not self.has_scales:
            return Pages(self._stored(keys), self._stored(values))
        keys, key_scales = quantised(keys)
        values, value_scales = quantised(values)
        return Pages(self._stored(keys), self._stored(values), key_scales, value_scales)

    def _stored(self, x: jax.Array) -> jax.Array:
        """x in the pages' dtype. fp8 has no infinity: what is beyond its range is made its largest."""
        if self.is_fp8:
            largest = float(jnp.finfo(self.dtype).max)
            x = jnp.clip(x, -largest, largest)
        return x.astype(self.dtype)

    def write(self, pages: Pages, keys: jax.Array, values: jax.Array, rows: Rows) -> Pages:
        """Store the step's new keys and values (each [T, K, H]) by a scatter, without the kernel."""
        page, offset = self.token_places(rows, keys.shape[0], pages.num_pages)
        return jax.tree.map(
            lambda stored, new: stored.at[page, :, offset].set(new, mode="drop"),
            pages,
            self.packed(keys, values),
        )

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def copy(self, pages: Pages, source: jax.Array, target: jax.Array, num_tokens: jax.Array) -> Pages:
        """Copy the first `num_tokens` tokens of page `source` into page `target` (scalars, i32)."""
        kept = jnp.arange(self.page_size) < num_tokens

        def copied(x: jax.Array) -> jax.Array:
            mask = kept[None, :, None] if x.ndim == 4 else kept[None]
            return x.at[target].set(jnp.where(mask, x[source], x[target]))

        return jax.tree.map(copied, pages)

    def tokens(self, pages: Pages, page_ids: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, each [num_tokens, K, H], of a sequence that lies in `page_ids` (on the host)."""

        def held(x: jax.Array, scales: jax.Array | None) -> np.ndarray:
            found = np.asarray(x)[page_ids]
            if scales is not None:
                found = found * np.asarray(scales)[page_ids][..., None]
            return found.swapaxes(1, 2).reshape(-1, self.num_kv_heads, self.head_dim)[:num_tokens]

        return held(pages.keys, pages.key_scales), held(pages.values, pages.value_scales)
