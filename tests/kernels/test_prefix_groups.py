"""Reading shared pages once for a group of rows changes nothing of what comes out.

No bit, where a backend adds in the same order in both.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.paged_attention import AttentionOptions, Groups, Rows, attend, page_layout
from tests.kernels.backends import BITWISE_BACKENDS, EVERY_BACKEND

NUM_SLOTS, TABLE_WIDTH, NUM_TOKENS, NUM_PAGES = 24, 12, 64, 300
KV_HEADS, RATIO, HEAD_DIM = 2, 3, 64


@partial(jax.jit, static_argnums=(6, 7))
def step(q, k, v, pages, rows, groups, options, layout):
    return attend(q, k, v, pages, rows, groups, options, layout)


class Case:
    """Rows that share pages along a tree of two levels, in slots next to each other."""

    def __init__(self, families, page_size, seed):
        """families: [(shared pages, [(further pages shared, [tokens of its own of each row])])]."""
        rng = np.random.default_rng(seed)
        free = iter(rng.permutation(NUM_PAGES - 1) + 1)
        self.table = np.zeros((NUM_SLOTS, TABLE_WIDTH), np.int32)  # page 0 is all NaN
        self.kv_len = np.zeros(NUM_SLOTS, np.int32)
        self.groups: list[tuple[int, int, int, int]] = []
        slot = 0
        for outer, branches in families:
            trunk = [next(free) for _ in range(outer)]
            first = slot
            inner = []
            for more, owns in branches:
                prefix = trunk + [next(free) for _ in range(more)]
                inner.append((slot, slot + len(owns), outer, outer + more))
                for own in owns:
                    total = len(prefix) * page_size + own
                    pages = prefix + [next(free) for _ in range(-(-own // page_size))]
                    self.table[slot, : len(pages)] = pages
                    self.kv_len[slot] = total
                    slot += 1
            self.groups.append((first, slot, 0, outer))
            self.groups += [group for group in inner if group[3] > group[2]]
        self.num_rows = slot
        self.page_size = page_size
        self.rng = rng

    def run(self, backend, options, dtype="float32"):
        """(with groups, without), each [rows, N, H]."""
        layout = page_layout(backend, KV_HEADS, HEAD_DIM, self.page_size, dtype)
        rng = np.random.default_rng(1)
        pages = layout.empty(NUM_PAGES)

        def filled(x):
            if x.dtype == jnp.int8:
                return jnp.asarray(rng.integers(-127, 128, x.shape), jnp.int8)
            values = rng.standard_normal(x.shape).astype(np.float32)
            values[0] = np.nan
            return jnp.asarray(values).astype(x.dtype)

        pages = jax.tree.map(filled, pages)
        start = np.minimum(np.arange(NUM_SLOTS + 1), self.num_rows).astype(np.int32)
        rows = Rows(*map(jnp.asarray, (start, self.kv_len, self.table)))
        shape = (NUM_TOKENS, KV_HEADS, HEAD_DIM)
        q = jnp.asarray(rng.standard_normal((NUM_TOKENS, KV_HEADS * RATIO, HEAD_DIM)), jnp.float32)
        k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
        arrays = np.zeros((4, NUM_SLOTS), np.int32)
        arrays[:, : len(self.groups)] = np.array(self.groups, np.int32).T
        grouped = Groups(*map(jnp.asarray, arrays))
        outs = [
            step(q, k, v, pages, rows, groups, options, layout)[0]
            for groups in (grouped, Groups.none(NUM_SLOTS))
        ]
        return [np.asarray(out)[: self.num_rows] for out in outs]


def assert_same(backend, grouped, plain, tolerance=2e-5):
    assert np.isfinite(plain).all()
    if backend in BITWISE_BACKENDS:
        assert np.array_equal(grouped, plain)
    else:
        np.testing.assert_allclose(grouped, plain, atol=tolerance, rtol=tolerance)


OPTIONS = [
    AttentionOptions(scale=0.125),
    AttentionOptions(scale=0.125, window=70),
    AttentionOptions(scale=0.125, chunk=96, soft_cap=3.0),
]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("options", OPTIONS)
def test_groups_change_nothing(backend, page_size, options):
    own = [1, 5, page_size, 2 * page_size - 1, 7, 30, page_size + 1, 2]
    families = [(3, [(0, own), (2, own[:5])]), (1, [(1, own[:3]), (3, own[:2])])]
    grouped, plain = Case(families, page_size, 0).run(backend, options)
    assert_same(backend, grouped, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_groups_change_nothing_of_narrow_pages(backend, dtype):
    families = [(4, [(0, list(range(1, 12))), (1, [3, 4])])]
    grouped, plain = Case(families, 64, 0).run(backend, OPTIONS[0], dtype)
    assert_same(backend, grouped, plain, tolerance=2e-2)


branches = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(1, 70), min_size=1, max_size=5)), min_size=1, max_size=2
)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@given(
    families=st.lists(st.tuples(st.integers(0, 4), branches), min_size=1, max_size=2), seed=st.integers(0, 99)
)
@settings(max_examples=15, deadline=None)
def test_any_tree_of_groups(backend, families, seed):
    grouped, plain = Case(families, 32, seed).run(backend, OPTIONS[0])
    assert_same(backend, grouped, plain)
