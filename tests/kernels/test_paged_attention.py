"""Every backend computes what the reference specifies, and nothing a sequence does not hold can reach it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.paged_attention import AttentionOptions, Groups, Rows, attend, page_layout
from kernels.paged_attention.reference import attend_sequence
from tests.kernels.backends import BITWISE_BACKENDS, EVERY_BACKEND

# One shape for all cases of a configuration, so that each is compiled once.
NUM_TOKENS = 320
NUM_SLOTS = 48
TABLE_WIDTH = 32


@partial(jax.jit, static_argnums=(6, 7))
def step(q, k, v, pages, rows, groups, options, layout, sinks=None):
    return attend(q, k, v, pages, rows, groups, options, layout, sinks)


def make_rows(counts, totals, table):
    """Rows whose slot i has `counts[i]` queries and holds `totals[i]` tokens; later slots are empty."""
    start = np.full(len(table) + 1, sum(counts), np.int32)
    start[: len(counts) + 1] = np.cumsum([0, *counts])
    kv_len = np.zeros(len(table), np.int32)
    kv_len[: len(totals)] = totals
    return Rows(jnp.asarray(start), jnp.asarray(kv_len), jnp.asarray(table))


def run(lengths, layout, options, *, group=2, sinks=False, seed=0):
    """Hold histories of `lengths` [(already held, new)], attend, and give (got, expected) per sequence."""
    rng = np.random.default_rng(seed)
    heads, dim = layout.num_kv_heads, layout.head_dim
    num_pages = 8 + max(256, 2048 // layout.page_size)
    free = rng.permutation(num_pages)
    pages = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), layout.empty(num_pages))
    table = np.full((NUM_SLOTS, TABLE_WIDTH), free[-1], np.int32)  # unused entries point at a page of NaN
    taken = 0
    for slot, (held, new) in enumerate(lengths):
        need = -(-(held + new) // layout.page_size)
        table[slot, :need] = free[taken : taken + need]
        taken += need
    assert taken < num_pages

    def normal(count, heads):
        x = np.full((count, heads, dim), np.nan, np.float32)
        x[:] = rng.standard_normal(x.shape)
        return x.astype(layout.dtype)

    held, new = [h for h, _ in lengths], [n for _, n in lengths]
    old_k, old_v = normal(1024, heads), normal(1024, heads)
    pages = layout.write(pages, jnp.asarray(old_k), jnp.asarray(old_v), make_rows(held, held, table))
    q, k, v = normal(NUM_TOKENS, heads * group), normal(NUM_TOKENS, heads), normal(NUM_TOKENS, heads)
    sink = rng.standard_normal(heads * group).astype(np.float32) if sinks else None
    rows = make_rows(new, [h + n for h, n in lengths], table)
    out, pages = step(*map(jnp.asarray, (q, k, v)), pages, rows, Groups.none(), options, layout, sink)
    out = np.asarray(out.astype(jnp.float32))
    assert not out[sum(new) :].any(), "padding tokens must come out as zero"
    pairs, at, old_at = [], 0, 0
    for slot, (h, n) in enumerate(lengths):
        keys = np.concatenate([old_k[old_at : old_at + h], k[at : at + n]])
        values = np.concatenate([old_v[old_at : old_at + h], v[at : at + n]])
        stored = layout.tokens(pages, table[slot], h + n)
        assert np.array_equal(stored[0], keys)
        assert np.array_equal(stored[1], values)
        want = attend_sequence(
            q[at : at + n].astype(np.float32),
            keys.astype(np.float32),
            values.astype(np.float32),
            options,
            sink,
        )
        pairs.append((out[at : at + n], want))
        at, old_at = at + n, old_at + h
    return pairs


def check(pairs, tolerance=2e-5):
    for got, want in pairs:
        np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


PLAIN = AttentionOptions(scale=0.25)


def layout_of(backend, *, kv_heads=2, head_dim=16, page_size=16, dtype="float32"):
    return page_layout(backend, kv_heads, head_dim, page_size, dtype)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("page_size", [8, 64, 128])
def test_mixed_rows_equal_the_reference(backend, page_size):
    lengths = [(37, 1), (0, 1), (70, 9), (0, 45), (90, 1), (0, 0)]
    check(run(lengths, layout_of(backend, page_size=page_size), PLAIN))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize(("group", "kv_heads", "head_dim"), [(1, 1, 64), (3, 3, 64), (4, 2, 80)])
def test_head_shapes(backend, group, kv_heads, head_dim):
    layout = layout_of(backend, kv_heads=kv_heads, head_dim=head_dim)
    check(run([(20, 1), (5, 12)], layout, PLAIN, group=group))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize(
    ("options", "sinks"),
    [
        (AttentionOptions(scale=0.3, window=1), False),
        (AttentionOptions(scale=0.3, window=20), True),
        (AttentionOptions(scale=0.3, chunk=16), False),
        (AttentionOptions(scale=0.3, chunk=50), True),
        (AttentionOptions(scale=1.5, soft_cap=5.0), False),
        (AttentionOptions(scale=0.3, window=33, soft_cap=2.0), True),
    ],
)
def test_options_equal_the_reference(backend, options, sinks):
    lengths = [(90, 1), (15, 1), (100, 50), (0, 70), (63, 2)]
    check(run(lengths, layout_of(backend), options, sinks=sinks))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_bfloat16_pages(backend):
    check(run([(37, 1), (10, 40)], layout_of(backend, dtype="bfloat16"), PLAIN), tolerance=2e-2)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60)), min_size=1, max_size=5),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None)
def test_any_mix_of_rows(backend, lengths, seed):
    check(run(lengths, layout_of(backend), PLAIN, seed=seed))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_more_sequences_than_a_decode_group(backend):
    check(run([(2 * i, 1) for i in range(30)] + [(1, 33)], layout_of(backend), PLAIN))


@pytest.mark.parametrize("backend", BITWISE_BACKENDS)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "page_size"),
    [(3, 3, 64, 16), (3, 3, 64, 64), (3, 3, 64, 128), (1, 2, 64, 64), (4, 1, 80, 64), (8, 4, 128, 64)],
)
def test_bits_do_not_depend_on_company_or_chunking(backend, kv_heads, group, head_dim, page_size):
    """One sequence, computed at once, in uneven chunks, or token by token among strangers: the same bits."""
    rng = np.random.default_rng(3)
    length = 150
    layout = page_layout(backend, kv_heads, head_dim, page_size, "float32")
    options = AttentionOptions(scale=head_dim**-0.5)
    pages_each = -(-length // page_size)
    q, k, v = (
        rng.standard_normal((length, heads, head_dim)).astype(np.float32)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )

    def sequence(chunks, strangers):
        pages = layout.empty((strangers + 1) * pages_each)
        table = np.arange((strangers + 1) * pages_each, dtype=np.int32).reshape(strangers + 1, -1)
        out, held = [], 0
        for chunk in chunks:
            held += chunk
            padded = -(-(chunk + strangers) // 16) * 16
            # The strangers decode, each at a length of its own, and come first.
            start = np.array([*range(strangers + 1), strangers + chunk], np.int32)
            kv_len = np.array([7 * i % length + 1 for i in range(strangers)] + [held], np.int32)

            def batch(x, held=held, chunk=chunk, padded=padded):
                noise = rng.standard_normal((padded, *x.shape[1:])).astype(np.float32)
                noise[strangers : strangers + chunk] = x[held - chunk : held]
                return jnp.asarray(noise)

            rows = Rows(jnp.asarray(start), jnp.asarray(kv_len), jnp.asarray(table))
            got, pages = step(batch(q), batch(k), batch(v), pages, rows, Groups.none(), options, layout)
            out.append(np.asarray(got)[strangers : strangers + chunk])
        return np.concatenate(out)

    whole = sequence([length], 0)
    assert np.array_equal(whole, sequence([length], 5))
    assert np.array_equal(whole, sequence([1, 40, 1, 33, 64, 11], 3))
    assert np.array_equal(whole, sequence([100] + [1] * 50, 20))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_copying_part_of_a_page(backend):
    layout = page_layout(backend, 2, 8, 8, "float32")
    rng = np.random.default_rng(0)
    pages = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), layout.empty(3))
    before = [layout.tokens(pages, np.array([page]), 8) for page in range(3)]
    copied = layout.copy(pages, jnp.int32(2), jnp.int32(0), jnp.int32(5))
    after = [layout.tokens(copied, np.array([page]), 8) for page in range(3)]
    for kind in range(2):  # keys, values
        assert np.array_equal(after[0][kind][:5], before[2][kind][:5])
        assert np.array_equal(after[0][kind][5:], before[0][kind][5:])
        for page in (1, 2):
            assert np.array_equal(after[page][kind], before[page][kind])


@pytest.mark.parametrize("page_size", [0, 7, 48, 1024])
def test_impossible_page_sizes_are_refused(page_size):
    with pytest.raises(ValueError, match="power of two"):
        page_layout("xla", 2, 8, page_size, "float32")


def test_a_backend_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="available: "):
        page_layout("mosaic", 2, 8, 16, "float32")
