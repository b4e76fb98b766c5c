"""Paged attention on a CPU by the native library: `kernels/cpu/src/attention.h`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels.paged_attention.layout import AttentionOptions, Groups, PageLayout, Pages, Rows


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    rows: Rows,
    groups: Groups,
    options: AttentionOptions,
    layout: PageLayout,
    sinks: jax.Array | None,
) -> tuple[jax.Array, Pages]:
    """See `kernels.paged_attention.attend`. The pages are written in place."""
    absent = jnp.zeros((0,), jnp.float32)
    stored = (
        pages.keys,
        pages.values,
        absent if pages.key_scales is None else pages.key_scales,
        absent if pages.value_scales is None else pages.value_scales,
    )
    results = (q, *stored)
    call = jax.ffi.ffi_call(
        "tidemill_attention",
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results),
        input_output_aliases={3: 1, 4: 2, 5: 3, 6: 4},
    )
    out, keys, values, key_scales, value_scales = call(
        q,
        k.astype(q.dtype),
        v.astype(q.dtype),
        *stored,
        rows.query_start,
        rows.kv_len,
        rows.page_table,
        groups.slot_start,
        groups.slot_stop,
        groups.page_stop,
        absent if sinks is None else sinks.astype(jnp.float32),
        scale=np.float32(options.scale),
        soft_cap=np.float32(options.soft_cap or 0.0),
        window=np.int64(options.window or 0),
        chunk=np.int64(options.chunk or 0),
    )
    if layout.has_scales:
        return out, Pages(keys, values, key_scales, value_scales)
    return out, Pages(keys, values)
