"""Random steps for the kernels of an accelerator: rows that share pages, prefill chunks, decodes and empty
slots, and NaN in everything that must not be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.paged_attention import AttentionOptions, Groups, PageLayout, Rows, pallas_tpu
from kernels.paged_attention.reference import attend_sequence
from kernels.paged_attention.tpu.tiles import TileSizes


@dataclass(frozen=True)
class Sequence_:
    """One row: `shared` pages of a prefix, `own` tokens behind them from earlier steps, `new` ones now."""

    family: int
    shared: int
    own: int
    new: int


SMALL_TILES = TileSizes(block=128, decodes=16, queries=16)


@dataclass(frozen=True)
class Shape:
    """What is compiled once for many steps, by the TPU kernel unless another is put in its place."""

    layout: PageLayout
    ratio: int
    options: AttentionOptions
    tiles: Any = SMALL_TILES
    num_cores: int = 1
    has_sinks: bool = False
    num_tokens: int = 96
    num_slots: int = 24
    num_pages: int = 160

    @property
    def table_width(self) -> int:
        return self.num_pages // 4

    def attend(self, q: Any, k: Any, v: Any, pages: Any, rows: Any, groups: Any, sinks: Any) -> Any:
        layout: Any = self.layout
        return pallas_tpu.attend(
            q, k, v, pages, rows, groups, self.options, layout, sinks,
            tiles=self.tiles, num_cores=self.num_cores,
        )  # fmt: skip


def random_rows(shape: Shape, seed: int, *, max_own: int = 150, max_new: int = 40) -> list[Sequence_]:
    """Two families with shared pages, some of their rows prefill chunks, and rows that share nothing.

    In odd steps only the first family has decodes, so that they are all of one group. The last row is a chunk
    of all tokens that are left.
    """
    rng = np.random.default_rng(seed)
    rows: list[Sequence_] = []
    budget = shape.num_tokens
    max_shared = max(5, 256 // shape.layout.page_size)
    for family, count in ((0, 7), (1, 3), (2, 1), (3, 1), (4, 1)):
        shared = int(rng.integers(1, max_shared + 1)) if family < 2 else 0
        decodes = 0.7 if family == 0 or seed % 2 == 0 else 0.0
        for _ in range(count):
            new = 1 if rng.random() < decodes else int(rng.integers(2, max_new))
            new = budget if family == 4 else min(new, budget)
            budget -= new
            if new:
                rows.append(Sequence_(family, shared, int(rng.integers(0, max_own)), new))
    return rows


@partial(jax.jit, static_argnums=0)
def _attend(shape: Shape, *arrays: Any) -> Any:
    return shape.attend(*arrays)


def check_step(shape: Shape, rows: Sequence[Sequence_], seed: int, tolerance: float) -> None:
    """Run one step and compare what comes out, and what is then in the pages, with the reference."""
    rng = np.random.default_rng(seed)
    layout, size = shape.layout, shape.layout.page_size
    heads, dim = layout.num_kv_heads, layout.head_dim
    dtype = jnp.float32 if layout.dtype == np.float32 else jnp.bfloat16

    def normal(count: int, num_heads: int) -> np.ndarray:
        return np.array(jnp.asarray(rng.standard_normal((count, num_heads, dim)), dtype))

    free = list(rng.permutation(shape.num_pages))
    poison = free.pop()  # what unused entries of page tables point at
    table = np.full((shape.num_slots, shape.table_width), poison, np.int32)
    shared = {row.family: row.shared for row in rows}
    trunks = {family: [free.pop() for _ in range(count)] for family, count in shared.items()}
    lengths = [row.shared * size + row.own for row in rows]
    for slot, (row, held) in enumerate(zip(rows, lengths, strict=True)):
        own = [free.pop() for _ in range(-(-(held + row.new) // size) - row.shared)]
        table[slot, : row.shared + len(own)] = trunks[row.family] + own
    histories = _histories(rows, size, normal, heads)
    pages = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan if x.dtype != jnp.int8 else 99), layout.empty(shape.num_pages)
    )
    pages = _with_histories(shape, pages, histories, table)

    start = np.full(shape.num_slots + 1, sum(row.new for row in rows), np.int32)
    start[: len(rows) + 1] = np.cumsum([0, *(row.new for row in rows)])
    kv_len = np.zeros(shape.num_slots, np.int32)
    kv_len[: len(rows)] = [held + row.new for row, held in zip(rows, lengths, strict=True)]
    q, k, v = (
        normal(shape.num_tokens, heads * shape.ratio),
        normal(shape.num_tokens, heads),
        normal(shape.num_tokens, heads),
    )
    for x in (q, k, v):
        x[start[-1] :] = np.nan
    sinks = rng.standard_normal(heads * shape.ratio).astype(np.float32) if shape.has_sinks else None
    step_rows = Rows(*map(jnp.asarray, (start, kv_len, table)))
    out, pages = _attend(shape, q, k, v, pages, step_rows, _groups(rows), sinks)
    out = np.asarray(out.astype(jnp.float32))
    assert not out[start[-1] :].any(), "padding tokens must come out as zero"
    for slot, row in enumerate(rows):
        new = slice(start[slot], start[slot + 1])
        keys, values = (np.concatenate([old, x[new]]) for old, x in zip(histories[slot], (k, v), strict=True))
        stored = layout.tokens(pages, table[slot], kv_len[slot])
        if layout.has_scales:
            for got, want in zip(stored, (keys, values), strict=True):
                np.testing.assert_allclose(got, want.astype(np.float32), atol=0.03)
            keys, values = stored
        else:
            # fp8 rounds what it stores; the other dtypes hold it as it is.
            stored = tuple(x.astype(np.float32) for x in stored)
            keys, values = (x.astype(layout.dtype).astype(np.float32) for x in (keys, values))
            assert np.array_equal(stored[0], keys), f"keys of row {slot}: {row}"
            assert np.array_equal(stored[1], values), f"values of row {slot}: {row}"
        query, keys, values = (x.astype(np.float32) for x in (q[new], keys, values))
        want = attend_sequence(query, keys, values, shape.options, sinks)
        np.testing.assert_allclose(
            out[new], want, atol=tolerance, rtol=tolerance, err_msg=f"row {slot}: {row}"
        )


def _with_histories(shape: Shape, pages: Any, histories: Sequence[tuple[np.ndarray, ...]], table: Any) -> Any:
    """The pages with every row's earlier tokens; a shared page is written once for each that shares it."""
    lengths = [len(keys) for keys, _ in histories]
    start = np.full(shape.num_slots + 1, sum(lengths), np.int32)
    start[: len(lengths) + 1] = np.cumsum([0, *lengths])
    kv_len = np.zeros(shape.num_slots, np.int32)
    kv_len[: len(lengths)] = lengths
    padding = -sum(lengths) % 4096
    arrays = (np.concatenate(each) for each in zip(*histories, strict=True))
    keys, values = (jnp.asarray(np.pad(x, [(0, padding), (0, 0), (0, 0)])) for x in arrays)
    return _write(shape.layout, pages, keys, values, Rows(*map(jnp.asarray, (start, kv_len, table))))


@partial(jax.jit, static_argnums=0)
def _write(layout: PageLayout, pages: Any, keys: Any, values: Any, rows: Rows) -> Any:
    return layout.write(pages, keys, values, rows)


def _histories(rows: Sequence[Sequence_], size: int, normal: Any, heads: int) -> list[tuple[np.ndarray, ...]]:
    """Each row's keys and values from before the step; those of a family begin alike."""
    shared = {row.family: row.shared for row in rows}
    trunks = {family: [normal(count * size, heads) for _ in range(2)] for family, count in shared.items()}
    return [
        tuple(np.concatenate([trunk, normal(row.own, heads)]) for trunk in trunks[row.family]) for row in rows
    ]


def _groups(rows: Sequence[Sequence_]) -> Groups:
    """A group of each family that shares pages, and inside the first one another of its first rows."""
    families = sorted({row.family for row in rows if row.shared})
    entries = []
    for family in families:
        slots = [slot for slot, row in enumerate(rows) if row.family == family]
        shared = rows[slots[0]].shared
        outer = shared - 1 if shared > 1 and len(slots) > 3 else shared
        entries.append((slots[0], slots[-1] + 1, 0, outer))
        if outer < shared:
            entries.append((slots[0], slots[0] + 3, outer, shared))
    arrays = np.zeros((4, 6), np.int32)
    arrays[:, : len(entries)] = np.array(entries, np.int32).reshape(-1, 4).T
    return Groups(*map(jnp.asarray, arrays))
