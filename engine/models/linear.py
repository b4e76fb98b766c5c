"""The one matrix product of the model: every weight goes through `project`.

Weights lie [out, in] and the product is x @ w.T. Measured on 2 cores (jax 0.10 on CPU, f32, T = 2 to 512 rows
against [1536, 576], [576, 1536], [3072, 576] and a [49152, 576] head): x @ w.T and x @ w with w as [in, out]
are equally fast within noise, but only x @ w.T gives a row the same bits at every T from 2 on, because the
[in, out] product goes to another kernel at T <= 16, which adds in another order. A token's result must not
depend on how many others share its step, so it is x @ w.T. T = 1 is the exception (a matrix-vector kernel):
steps are padded to at least `MIN_STABLE_ROWS`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

MIN_STABLE_ROWS = 8
"""From this many rows on, a row has the same bits whatever the number of rows (CPU, f32).

Measured: 2 are enough, at the widths above and at those of a tiny model. 8 is a whole tile, and leaves room.
"""


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, in] times weight [out, in], transposed: f32[T, out], accumulated in f32.

    float32 weights are multiplied in full float32: a TPU or a GPU would otherwise round them to
    bfloat16 or TF32.
    """
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


class Linear(nnx.Module):
    """y = x @ weight.T + bias. `weight` [out, in]; `bias` [out] or absent."""

    def __init__(self, in_dim: int, out_dim: int, *, use_bias: bool, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros((out_dim, in_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, in] -> [T, out] in x's dtype."""
        y = project(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
