"""Drawing tokens on a CPU by the native library: `kernels/cpu/src/sampling.h`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.sampling.layout import Draws


def draw(logits: jax.Array, draws: Draws, num_rows: jax.Array) -> jax.Array:
    """See `kernels.sampling.draw`."""
    call = jax.ffi.ffi_call("tidemill_sampling", jax.ShapeDtypeStruct((logits.shape[0],), jnp.int32))
    return call(
        logits,
        draws.temperature,
        draws.top_k,
        draws.top_p,
        draws.min_p,
        draws.keys,
        draws.positions,
        num_rows.reshape(1),
    )
