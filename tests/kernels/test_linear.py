"""Every backend computes what the reference specifies, and a row's bits are its own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.cpu import isa_name
from kernels.linear import (
    WEIGHT_FORMATS,
    available_backends,
    gated_linear,
    linear,
    pack_weights,
    reference,
    weight_rows,
)
from kernels.linear.quantise import dequantised, quantise, rounded_activations

EPS = 1e-5
needs_native = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native library was not built"
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def used_matrix(matrix: np.ndarray, weight_format: str) -> np.ndarray:
    """What a product multiplies by, in f32, once the matrix has been packed in a format."""
    if weight_format in ("int8", "int4"):
        return dequantised(quantise(matrix, weight_format), matrix.shape[1])
    return matrix.astype(jnp.dtype(weight_format)).astype(np.float32)


def close(got: jax.Array, expected: jax.Array, *, is_rounded: bool) -> None:
    """Within rounding; where activations are rounded to 8 bits, one of them may fall to the other side."""
    exact = np.asarray(expected, np.float32)
    error = np.abs(np.asarray(got, np.float32) - exact)
    scale = max(1.0, float(np.abs(exact).max()))
    assert error.max(initial=0) <= (5e-3 if is_rounded else 1e-5) * scale
    assert error.mean() <= (5e-5 if is_rounded else 1e-5) * scale


@partial(jax.jit, static_argnames=("activation", "eps", "out_dtype"))
def product(x, weight, bias, residual, norm_weight, num_rows, *, activation=None, eps=EPS, out_dtype=None):
    norm = None if norm_weight is None else (norm_weight, eps)
    if activation is not None:
        return gated_linear(x, weight, bias, num_rows, activation=activation, norm=norm)
    return linear(x, weight, bias, num_rows, residual=residual, norm=norm, out_dtype=out_dtype)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("backend", available_backends())
# Every example is compiled for its own shapes, so they are few, and a failing one is not made smaller.
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    out_dim=st.integers(1, 100),
    in_dim=st.one_of(st.integers(1, 200), st.sampled_from([256, 257, 512, 600, 1100])),
    num_tokens=st.one_of(st.integers(1, 20), st.sampled_from([64, 131, 300])),
    padding=st.integers(0, 9),
    layer=st.integers(0, 2),
    activation=st.sampled_from([None, None, "silu", "gelu_tanh"]),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_a_product_is_what_the_reference_says(
    backend, weight_format, out_dim, in_dim, num_tokens, padding, layer, activation, has, seed
):
    num_matrix_rows = out_dim * (2 if activation else 1)
    matrices = [normal(seed + i, num_matrix_rows, in_dim) / np.sqrt(in_dim) for i in range(3)]
    weights = pack_weights(matrices, weight_format, backend, is_gated=activation is not None)
    x = normal(seed + 10, num_tokens, in_dim)
    num_rows = max(0, num_tokens - padding)
    x[num_rows:] = np.nan  # nothing of a padding row reaches a result
    x = jnp.asarray(x)
    bias = jnp.asarray(normal(seed + 11, num_matrix_rows)) if has[0] else None
    residual = jnp.asarray(normal(seed + 12, num_tokens, out_dim)) if has[1] and not activation else None
    norm_weight = jnp.asarray(normal(seed + 13, in_dim)) if has[2] else None
    got = product(x, weights.layer(layer), bias, residual, norm_weight, num_rows, activation=activation)
    matrix = jnp.asarray(used_matrix(matrices[layer], weight_format))
    is_rounded = backend == "cpu" and weight_format in ("int8", "int4")
    plain = jnp.nan_to_num(x)
    if norm_weight is not None:
        plain = reference.normalise(plain, norm_weight, EPS)
    if is_rounded:
        plain = rounded_activations(plain)
    expected = reference.linear(
        plain, matrix, bias, activation=activation, residual=residual, num_rows=num_rows
    )
    assert np.all(np.asarray(got)[num_rows:] == 0)
    close(got, expected, is_rounded=is_rounded)
    ids = jnp.asarray([0, num_matrix_rows - 1, num_matrix_rows // 2])
    np.testing.assert_allclose(weight_rows(weights, ids, layer), matrix[ids], rtol=1e-6)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("backend", available_backends())
@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    out_dim=st.integers(1, 100),
    in_dim=st.one_of(st.integers(1, 200), st.sampled_from([256, 288, 4128, 5000])),
    num_tokens=st.one_of(st.integers(1, 30), st.sampled_from([131, 150])),
    padding=st.integers(0, 9),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    out_dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 1000),
)
def test_bfloat16_rows_and_weights_are_multiplied_as_they_are(
    backend, activation, out_dim, in_dim, num_tokens, padding, has, out_dtype, seed
):
    """Nothing is lost but by rounding a normalised row, and the result; sums are float32."""
    num_matrix_rows = out_dim * (2 if activation else 1)
    matrix = normal(seed, num_matrix_rows, in_dim) / np.sqrt(in_dim)
    weight = pack_weights([matrix], "bfloat16", backend, is_gated=activation is not None).layer(0)
    num_rows = max(0, num_tokens - padding)
    x = normal(seed + 10, num_tokens, in_dim)
    x[num_rows:] = np.nan
    x = jnp.asarray(x, jnp.bfloat16)
    bias = jnp.asarray(normal(seed + 11, num_matrix_rows)) if has[0] else None
    norm_weight = jnp.asarray(normal(seed + 12, in_dim)) if has[1] else None
    residual = None
    if has[2] and not activation:
        residual = jnp.asarray(normal(seed + 13, num_tokens, out_dim), jnp.bfloat16)
    if activation:
        out_dtype = "bfloat16"
    got = product(
        x, weight, bias, residual, norm_weight, num_rows, activation=activation, out_dtype=out_dtype
    )
    expected = reference.linear(
        jnp.nan_to_num(x).astype(jnp.float32),
        jnp.asarray(used_matrix(matrix, "bfloat16")),
        bias,
        activation=activation,
        residual=residual,
        norm=None if norm_weight is None else (norm_weight, EPS),
        num_rows=num_rows,
        is_narrow=True,
    )
    assert got.dtype == out_dtype
    # Two sums of squares may round a normalised value to either side.
    loss = (2**-8 if out_dtype == "bfloat16" else 0) + (2e-3 if has[1] else 1e-5)
    scale = np.maximum(1.0, np.abs(np.asarray(expected)))
    assert np.all(np.abs(np.asarray(got, np.float32) - np.asarray(expected)) <= loss * scale)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("backend", available_backends())
def test_bfloat16_activations_are_rounded_once(backend, weight_format):
    matrix = normal(1, 96, 130) / 11
    x = jnp.asarray(normal(2, 17, 130), jnp.bfloat16)
    weight = pack_weights([matrix], weight_format, backend).layer(0)
    got = product(x, weight, None, None, None, 17)
    plain = x.astype(jnp.float32)
    if backend == "cpu" and weight_format in ("int8", "int4"):
        plain = rounded_activations(plain)
    expected = reference.linear(plain, jnp.asarray(used_matrix(matrix, weight_format)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize(
    ("weight_format", "dtype"), [*((each, "float32") for each in WEIGHT_FORMATS), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("backend", available_backends())
def test_a_rows_bits_depend_on_nothing_else(backend, weight_format, dtype):
    """Not on the number of rows, its place, its company, `num_rows`, or the layers packed beside its own."""
    in_dim, out_dim = 600, 90
    matrices = [normal(i, 2 * out_dim, in_dim) / 25 for i in range(3)]
    norm_weight = jnp.asarray(normal(5, in_dim))
    x = normal(6, 300, in_dim).astype(jnp.dtype(dtype))
    for activation in (None, "silu"):
        is_gated = activation is not None
        many = pack_weights(matrices, weight_format, backend, is_gated=is_gated)
        alone = pack_weights(matrices[1:2], weight_format, backend, is_gated=is_gated)
        run = partial(product, bias=None, residual=None, norm_weight=norm_weight, activation=activation)
        expected = np.asarray(run(jnp.asarray(x), many.layer(1), num_rows=300))
        for num_tokens in (1, 2, 5, 7, 13, 64, 133, 300):
            order = np.random.default_rng(num_tokens).permutation(300)[:num_tokens]
            got = np.asarray(run(jnp.asarray(x[order]), alone.layer(0), num_rows=num_tokens))
            np.testing.assert_array_equal(got, expected[order])
        padded = np.asarray(run(jnp.asarray(x), many.layer(1), num_rows=77))
        np.testing.assert_array_equal(padded[:77], expected[:77])


_ISA_SCRIPT = """
import sys
import jax.numpy as jnp, numpy as np
from kernels.cpu import isa_name
from kernels.linear import gated_linear, linear, pack_weights
assert isa_name() == sys.argv[1], isa_name()
rng = np.random.default_rng(0)
results = []
cases = [("float32", each) for each in ("float32", "bfloat16", "int8", "int4")] + [("bfloat16", "bfloat16")]
for dtype, weight_format in cases:
    for out_dim, in_dim, num_tokens in ((70, 600, 29), (32, 64, 1), (96, 70, 150), (40, 1400, 45)):
        matrix = rng.standard_normal((out_dim, in_dim)).astype(np.float32) / in_dim**0.5
        x = jnp.asarray(rng.standard_normal((num_tokens, in_dim)).astype(np.float32), dtype)
        norm = (jnp.ones(in_dim), 1e-5)
        packed = pack_weights([matrix], weight_format, "cpu").layer(0)
        results.append(linear(x, packed, out_dtype=jnp.float32))
        some = slice(num_tokens // 3, num_tokens // 3 + 3)  # a row's bits are its own
        assert (linear(x[some], packed, out_dtype=jnp.float32) == results[-1][some]).all()
        weight = pack_weights([matrix], weight_format, "cpu", is_gated=True).layer(0)
        results.append(gated_linear(x, weight, norm=norm))
np.savez(sys.argv[2], *[np.asarray(result, np.float32) for result in results])
"""


@needs_native
def test_every_instruction_set_here_agrees(tmp_path):
    """The best one, whose results the other tests hold; the baseline; and tiles, those in memory."""
    found = {}
    for isa in {isa_name(), "baseline", "amx-emulated"}:
        path = tmp_path / f"{isa}.npz"
        environment = {**os.environ, "TIDEMILL_CPU_ISA": isa}
        subprocess.run([sys.executable, "-c", _ISA_SCRIPT, isa, path], check=True, env=environment)
        with np.load(path) as loaded:
            found[isa] = [loaded[name] for name in loaded.files]
    for isa in (isa_name(), "amx-emulated"):
        for got, plain in zip(found[isa], found["baseline"], strict=True):
            assert (
                np.abs(got - plain).mean() <= 2e-5
            )  # a gated result in bfloat16 may be rounded to either side
            np.testing.assert_allclose(got, plain, atol=2e-2)
    # By tiles too a group of 8-bit numbers adds up to a whole number, and all else is the same code.
    num_narrow = len(found["baseline"]) // 5
    for got, plain in zip(found["amx-emulated"][:-num_narrow], found["baseline"][:-num_narrow], strict=True):
        np.testing.assert_array_equal(got, plain)


def test_what_does_not_fit_is_refused_by_name():
    backend = available_backends()[0]
    weight = pack_weights([normal(0, 8, 4)], "float32", backend).layer(0)
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="weight format 'int3' is unknown"):
        pack_weights([normal(0, 8, 4)], "int3", backend)
    with pytest.raises(ValueError, match="linear backend 'gpu' is unknown"):
        pack_weights([normal(0, 8, 4)], "int8", "gpu")
    with pytest.raises(ValueError, match=r"layer's matrix is \(8, 5\)"):
        pack_weights([normal(0, 8, 4), normal(0, 8, 5)], "float32", backend)
    with pytest.raises(ValueError, match="7 rows"):
        pack_weights([normal(0, 7, 4)], "float32", backend, is_gated=True)
    with pytest.raises(ValueError, match="call linear"):
        gated_linear(x, weight)
    with pytest.raises(ValueError, match=r"give float32 or bfloat16 \[T, 4\]"):
        linear(jnp.ones((2, 5)), weight)
    with pytest.raises(ValueError, match="residual is"):
        linear(x, weight, residual=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="bias is"):
        linear(x, weight, jnp.ones(4))
