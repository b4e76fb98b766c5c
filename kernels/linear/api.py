"""The one entry to matrix products; the weights name the backend they were packed for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.cpu import native_library
from kernels.linear import cpu, xla
from kernels.linear.layout import PackedWeight, PackedWeights

_BACKENDS = {"cpu": cpu.multiply, "xla": xla.multiply}


def available_backends() -> tuple[str, ...]:
    """Names that `pack_weights` accepts here, the fastest first; "cpu" where the native library is."""
    return ("xla",) if native_library() is None else ("cpu", "xla")


def linear(
    x: jax.Array,
    weight: PackedWeight,
    bias: jax.Array | None = None,
    num_rows: jax.Array | int | None = None,
    *,
    residual: jax.Array | None = None,
    norm: tuple[jax.Array, float] | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """y = x @ w.T, accumulated in f32.

    Args:
        x: [T, in], float32 or bfloat16.
        weight: the matrix w [out, in], packed.
        bias: [out], added to each row.
        num_rows: i32 scalar, may be traced: only the rows before it matter. The others come out as zeros and,
            with the native backend, cost nothing. All of them by default.
        residual: [T, out] in x's dtype, added to the result.
        norm: (weight [in], eps) of a root mean square norm that x goes through first, in f32. What comes out
            of it is rounded to bfloat16 where x and w are.
        out_dtype: of what is returned, float32 or bfloat16; x's by default.

    Returns:
        [T, out]. A row has the same bits whatever T, `num_rows` and the other rows are.

    Raises ValueError where shapes or dtypes do not fit.
    """
    if weight.meta.is_gated:
        raise ValueError("these weights were packed with is_gated=True; call gated_linear")
    return _multiply(x, weight, bias, None, residual, norm, num_rows, out_dtype)


def gated_linear(
    x: jax.Array,
    weight: PackedWeight,
    bias: jax.Array | None = None,
    num_rows: jax.Array | int | None = None,
    *,
    activation: str = "silu",
    norm: tuple[jax.Array, float] | None = None,
) -> jax.Array:
    """activation(x @ gate.T) * (x @ up.T): [T, inner] (Shazeer 2020, arXiv:2002.05202).

    `weight` was packed with `is_gated=True` from [2 * inner, in], the gate's rows first; so goes `bias`
    [2 * inner]. `activation` is "silu" or "gelu_tanh". The rest is as in `linear`.
    """
    if not weight.meta.is_gated:
        raise ValueError("these weights were packed with is_gated=False; call linear")
    if activation not in xla.ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; give one of {', '.join(xla.ACTIVATIONS)}")
    return _multiply(x, weight, bias, activation, None, norm, num_rows, None)


def _multiply(
    x: jax.Array,
    weight: PackedWeight,
    bias: jax.Array | None,
    activation: str | None,
    residual: jax.Array | None,
    norm: tuple[jax.Array, float] | None,
    num_rows: jax.Array | int | None,
    out_dtype: jax.typing.DTypeLike | None,
) -> jax.Array:
    meta = weight.meta
    if x.ndim != 2 or x.shape[1] != meta.in_dim or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; give float32 or bfloat16 [T, {meta.in_dim}]")
    if bias is not None and bias.shape != (meta.num_rows,):
        raise ValueError(f"bias is {list(bias.shape)}; give [{meta.num_rows}]")
    if residual is not None and (residual.shape != (x.shape[0], meta.out_dim) or residual.dtype != x.dtype):
        found, expected = f"{residual.dtype}{list(residual.shape)}", f"{x.dtype}[{len(x)}, {meta.out_dim}]"
        raise ValueError(f"residual is {found}; give {expected}")
    if norm is not None and norm[0].shape != (meta.in_dim,):
        raise ValueError(f"the norm's weight is {list(norm[0].shape)}; give [{meta.in_dim}]")
    count = jnp.asarray(x.shape[0] if num_rows is None else num_rows, jnp.int32)
    return _BACKENDS[meta.backend](
        x, weight, bias, activation, residual, norm, count, jnp.dtype(out_dtype or x.dtype)
    )


def weight_rows(weights: PackedWeights, row_ids: jax.Array, layer: int = 0) -> jax.Array:
    """f32[T, in]: the rows `row_ids` i32[T] of a packed matrix (an embedding table's, say)."""
    return {"cpu": cpu.rows, "xla": xla.rows}[weights.meta.backend](weights, layer, row_ids)
