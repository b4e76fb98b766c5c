"""The copies of pages that a step begins with do what they say, in every dtype, and touch nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.page_copies import make_copy
from kernels.cpu import native_library
from kernels.paged_attention import Pages, page_layout

NUM_LAYERS, NUM_PAGES, PAGE_SIZE = 3, 70, 8
# One after the other: page 5 gets what page 1 was given. The last column is beyond those that are made.
COPIES = np.array([[4, 1, 2], [1, 5, 6], [8, 8, 8]], np.int32)
BACKENDS = ("xla",) if native_library() is None else ("cpu", "xla")


def filled(dtype: str, backend: str) -> tuple[Pages, Pages]:
    """Pages whose numbers are all different, twice: one pair is given away."""
    layout = page_layout(backend, 2, 4, PAGE_SIZE, dtype)
    shapes = jax.eval_shape(lambda: layout.empty(NUM_LAYERS * NUM_PAGES))
    numbers = [jnp.arange(x.size).reshape(x.shape).astype(x.dtype) for x in jax.tree.leaves(shapes)]
    made = jax.tree.unflatten(jax.tree.structure(shapes), numbers)
    return made, jax.tree.map(jnp.copy, made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_are_copied_in_every_layer_one_after_the_other(backend, dtype):
    layout = page_layout(backend, 2, 4, PAGE_SIZE, dtype)
    pages, before = filled(dtype, backend)
    copy = jax.jit(make_copy(layout, NUM_LAYERS), donate_argnums=0)
    after = copy(pages, jnp.asarray(COPIES), jnp.int32(2))
    for x, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        expected = np.array(old.astype(jnp.float32)).reshape(NUM_LAYERS, NUM_PAGES, -1)
        expected[:, 1] = expected[:, 4]
        expected[:, 5] = expected[:, 1]
        np.testing.assert_array_equal(np.asarray(x, np.float32).reshape(expected.shape), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_takes_no_room_of_its_own(backend, dtype):
    """XLA's code would widen all pages of bfloat16, on a CPU, to copy one of them."""
    if (backend, dtype) == ("xla", "bfloat16"):
        pytest.skip("only the native kernels promise it")
    layout = page_layout(backend, 2, 4, PAGE_SIZE, dtype)
    pages, _ = filled(dtype, backend)
    copy = jax.jit(make_copy(layout, NUM_LAYERS), donate_argnums=0)
    compiled = copy.lower(pages, jnp.asarray(COPIES), jnp.int32(2)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    total = sum(x.nbytes for x in jax.tree.leaves(pages))
    assert memory.temp_size_in_bytes < total / 4
    assert memory.alias_size_in_bytes == total


@pytest.mark.skipif(native_library() is None, reason="the native library was not built")
def test_a_page_that_is_not_there_is_refused():
    layout = page_layout("cpu", 2, 4, PAGE_SIZE, "bfloat16")
    for wrong in (NUM_PAGES, -1):
        pages, _ = filled("bfloat16", "cpu")
        copies = COPIES.copy()
        copies[1, 0] = wrong
        with pytest.raises(jax.errors.JaxRuntimeError, match="an item is out of bounds"):
            jax.block_until_ready(jax.jit(make_copy(layout, NUM_LAYERS))(pages, copies, jnp.int32(1)))
