"""What paged attention is given: how a page lies in memory, the step's rows, and the static options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Pages(NamedTuple):
    """One layer's keys and values; only the backend that made them knows their layout.

    int8 pages have a scale for each token and KV head: what is stored times its scale is the value. Over
    them the native backend multiplies whole numbers: it quantises queries likewise, and the weights of each
    64 keys, times the scales of their values, to bytes (`kernels/cpu/src/attention_int8.h`).
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @property
    def num_pages(self) -> int:
        return self.keys.shape[0]


class Rows(NamedTuple):
    """The sequences of one step. Slot `s` is empty when `query_start[s] == query_start[s + 1]`.

    The queries of slot `s` are the tokens `[query_start[s], query_start[s + 1])` of the step; they are
    the last ones of the `kv_len[s]` tokens that the sequence holds once the step has written its own.
    Token `t` of the sequence lies in page `page_table[s, t // page_size]` at `t % page_size`; entries
    past the last page are never read.
    """

    query_start: jax.Array  # i32[S + 1], not decreasing
    kv_len: jax.Array  # i32[S]
    page_table: jax.Array  # i32[S, max pages of a sequence]

    @property
    def query_len(self) -> jax.Array:
        return self.query_start[1:] - self.query_start[:-1]

    def token_slot(self, num_tokens: int) -> jax.Array:
        """i32[T]: the slot each token of the step belongs to; `S` for padding tokens."""
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        return jnp.sum(tokens[:, None] >= self.query_start[None, 1:], axis=1, dtype=jnp.int32)

    def token_position(self, num_tokens: int) -> jax.Array:
        """i32[T]: each token's position in its sequence (unspecified for padding tokens)."""
        slot = jnp.minimum(self.token_slot(num_tokens), self.kv_len.shape[0] - 1)
        first = self.kv_len[slot] - self.query_len[slot]
        return first + jnp.arange(num_tokens, dtype=jnp.int32) - self.query_start[slot]


class Groups(NamedTuple):
    """Which slots of a step share leading pages, so that attention may read those once for all of them.

    The slots [slot_start, slot_stop) of a group have the same page ids in the columns [page_start,
    page_stop) of their page tables: full pages, all before each slot's first query. Groups may be nested
    along a prefix tree: a group's slots lie inside its parent's, and its pages begin where its parent's
    stop; a group without a parent begins with page 0. Unused entries have slot_start == slot_stop.
    """

    slot_start: jax.Array  # i32[G]
    slot_stop: jax.Array  # i32[G]
    page_start: jax.Array  # i32[G]
    page_stop: jax.Array  # i32[G]

    @classmethod
    def none(cls, num_groups: int = 1) -> Groups:
        """No sharing: plain attention."""
        return cls(*(jnp.zeros(num_groups, jnp.int32) for _ in cls._fields))


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Static choices of one layer's attention.

    A query at position `i` sees keys at `j <= i`, of these with `window` only `i - j < window`, with
    `chunk` only `j // chunk == i // chunk`. Logits are `scale * q.k`, with `soft_cap` then
    `soft_cap * tanh(logit / soft_cap)`.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("window", "chunk", "soft_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"AttentionOptions.{name} is {value}; give a positive value or None")

    @property
    def is_bounded(self) -> bool:
        """A query may not see all before it."""
        return self.window is not None or self.chunk is not None

    def first_visible(self, position: jax.Array) -> jax.Array:
        """The lowest key position that a query at `position` sees (same shape as `position`)."""
        first = jnp.zeros_like(position)
        if self.window is not None:
            first = jnp.maximum(first, position - (self.window - 1))
        if self.chunk is not None:
            first = jnp.maximum(first, position // self.chunk * self.chunk)
        return first


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How a backend stores pages: keys [P, K, H, page], values [P, K, page, H].

    With tokens last in the keys and first in the values, both products of attention read a page with
    unit stride and need no transpose.
    """

    backend: str
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: np.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer, keys and values (and their scales) together."""
        token_bytes = self.head_dim * self.dtype.itemsize + (4 if self.has_scales else 0)
        return 2 * self.num_kv_heads * self.page_size * token_bytes

    @property
    def has_scales(self) -> bool:
        return self.dtype == np.int8

    def empty(self, num_pages: int) -> Pages:
        """New pages. What is in them is unspecified: nothing of it is read before it is written.

        On a CPU they take memory only as they are written, so that a budget which is not used costs nothing.
        """

        def array(*shape: int, dtype: Any = self.dtype) -> jax.Array:
            if self.backend != "cpu":
                return jnp.zeros(shape, dtype)
            return jax.ffi.ffi_call("tidemill_uninitialized", jax.ShapeDtypeStruct(shape, dtype))()

        heads, dim, size = self.num_kv_heads, self.head_dim, self.page_size
        pages = Pages(array(num_pages, heads, dim, size), array(num_pages, heads, size, dim))
        if not self.has_scales:
            return pages
        return pages._replace(
            key_scales=array(num_pages, heads, size, dtype=jnp.float32),
            value_scales=array(num_pages, heads, size, dtype=jnp.float32),
        )

    def token_places(self, rows: Rows, num_tokens: int, num_pages: int) -> tuple[jax.Array, jax.Array]:
        """i32[T] page and i32[T] offset of each token of the step; padding tokens have page `num_pages`."""
        slot = rows.token_slot(num_tokens)
        position = rows.token_position(num_tokens)
        num_slots = rows.kv_len.shape[0]
        page = rows.page_table[jnp.minimum(slot, num_slots - 1), position // self.page_size]
        return jnp.where(slot < num_slots, page, num_pages), position % self.page_size

    def write(self, pages: Pages, keys: jax.Array, values: jax.Array, rows: Rows) -> Pages:
        """Store the step's new keys and values (each [T, K, H]) in their sequences' pages.

        Padding tokens are given an index past the last page, which the scatter drops.
        """
        page, offset = self.token_places(rows, keys.shape[0], pages.num_pages)
        if self.has_scales:
            keys, key_scales = quantised(keys)
            values, value_scales = quantised(values)
            assert pages.key_scales is not None and pages.value_scales is not None  # noqa: PT018
            pages = pages._replace(
                key_scales=pages.key_scales.at[page, :, offset].set(key_scales, mode="drop"),
                value_scales=pages.value_scales.at[page, :, offset].set(value_scales, mode="drop"),
            )
        return pages._replace(
            keys=pages.keys.at[page, :, :, offset].set(keys.astype(self.dtype), mode="drop"),
            values=pages.values.at[page, :, offset, :].set(values.astype(self.dtype), mode="drop"),
        )

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def copy(self, pages: Pages, source: jax.Array, target: jax.Array, num_tokens: jax.Array) -> Pages:
        """Copy the first `num_tokens` tokens of page `source` into page `target` (scalars, i32)."""
        kept = jnp.arange(self.page_size) < num_tokens

        def copied(x: jax.Array, mask: jax.Array) -> jax.Array:
            return x.at[target].set(jnp.where(mask, x[source], x[target]))

        masks = Pages(kept[None, None], kept[None, :, None])
        if self.has_scales:
            masks = masks._replace(key_scales=kept[None], value_scales=kept[None])
        return jax.tree.map(copied, pages, masks)

    @property
    def copies_whole_pages(self) -> bool:
        """Whether `copy_whole` is the way to copy: XLA reads the target too, and widens pages of bfloat16."""
        return self.backend == "cpu"

    def copy_whole(self, pages: Pages, num_layers: int, copies: jax.Array, num_copies: jax.Array) -> Pages:
        """Copy page copies[0, i] to copies[1, i] in each of `num_layers` layers, in place, for the first
        `num_copies` (i32 scalar) columns of `copies` i32[at least 2, n], one after the other.

        Raises XlaRuntimeError for a page that is not there.
        """

        def copied(x: jax.Array) -> jax.Array:
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            call = jax.ffi.ffi_call("tidemill_copy_items", shape, input_output_aliases={0: 0})
            return call(x, copies, num_copies, num_layers=np.int64(num_layers))

        return jax.tree.map(copied, pages)

    def tokens(self, pages: Pages, page_ids: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, each [num_tokens, K, H], of a sequence that lies in `page_ids` (on the host)."""
        keys = np.asarray(pages.keys)[page_ids].transpose(0, 3, 1, 2)
        values = np.asarray(pages.values)[page_ids].transpose(0, 2, 1, 3)
        if self.has_scales:
            keys = keys * np.asarray(pages.key_scales)[page_ids].transpose(0, 2, 1)[..., None]
            values = values * np.asarray(pages.value_scales)[page_ids].transpose(0, 2, 1)[..., None]
        shape = (-1, self.num_kv_heads, self.head_dim)
        return keys.reshape(shape)[:num_tokens], values.reshape(shape)[:num_tokens]


def quantised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [T, K, H] as whole numbers from -127 to 127 and their scales f32[T, K]: symmetric over each head."""
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(-1)
    inverse = jnp.where(largest > 0, 127.0 / jnp.where(largest > 0, largest, 1.0), 0.0)
    return jnp.rint(wide * inverse[..., None]), largest / 127.0
