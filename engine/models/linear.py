"""A layer's matrix product: over a plain array, or over weights packed for this machine (`kernels.linear`).

The plain form is the specification, and what the tests' dense model runs; a step always has packed weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.linear import PackedWeight, gated_linear, linear

if TYPE_CHECKING:
    from engine.models.llama import RMSNorm


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
    """y = x @ weight.T + bias. `weight` [out, in], or packed; `bias` [out] or absent.

    sum_axis: the mesh axis whose chips each hold some of the inputs, and whose results are added; one of the
        chips has the bias, the others zeros.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, use_bias: bool, dtype: jnp.dtype, sum_axis: str | None = None
    ):
        self.sum_axis = sum_axis
        self.weight = nnx.Param(jnp.zeros((out_dim, in_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if use_bias else None

    def __call__(
        self,
        x: jax.Array,
        *,
        norm: RMSNorm | None = None,
        residual: jax.Array | None = None,
        num_rows: jax.Array | None = None,
    ) -> jax.Array:
        """x [T, in], normalised first by `norm` -> [T, out] in x's dtype, plus `residual` [T, out].

        num_rows: i32[], rows past it are padding and whatever comes out.
        """
        weight = self.weight.get_value()
        if isinstance(weight, PackedWeight):
            scale = None if norm is None else (norm.weight.get_value(), norm.eps)
            if self.sum_axis is None:
                return linear(x, weight, self._bias(), num_rows, residual=residual, norm=scale)
            y = jax.lax.psum(linear(x, weight, self._bias(), num_rows, norm=scale), self.sum_axis)
            return y if residual is None else y + residual
        y = self._plain(x, weight, norm).astype(x.dtype)
        return y if residual is None else y + residual

    def gated(self, x: jax.Array, *, norm: RMSNorm, num_rows: jax.Array | None = None) -> jax.Array:
        """silu(gate) * up, of which `weight` holds the rows, the gate's first: x [T, in] -> [T, out / 2]."""
        weight = self.weight.get_value()
        if isinstance(weight, PackedWeight):
            return gated_linear(x, weight, self._bias(), num_rows, norm=(norm.weight.get_value(), norm.eps))
        gate, up = jnp.split(self._plain(x, weight, norm).astype(x.dtype), 2, axis=-1)
        return jax.nn.silu(gate) * up

    def _plain(self, x: jax.Array, weight: jax.Array, norm: RMSNorm | None) -> jax.Array:
        y = project(x if norm is None else norm(x), weight)
        bias = self._bias()
        return y if bias is None else y + bias.astype(jnp.float32)

    def _bias(self) -> jax.Array | None:
        return None if self.bias is None else self.bias.get_value()
