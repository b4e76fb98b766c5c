"""The one entry to paged attention; a backend asked for by name is used or refused, never replaced."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kernels.cpu import native_library, why_absent
from kernels.paged_attention import cpu, xla
from kernels.paged_attention.gpu.layout import GpuPageLayout
from kernels.paged_attention.layout import AttentionOptions, Groups, PageLayout, Pages, Rows
from kernels.paged_attention.tpu.layout import TpuPageLayout, TpuPages


def _attend_tpu(*arguments: Any) -> tuple[jax.Array, Any]:
    from kernels.paged_attention import pallas_tpu  # late: nothing else needs Pallas, which takes a while

    return pallas_tpu.attend(*arguments)


def _attend_gpu(*arguments: Any) -> tuple[jax.Array, Any]:
    from kernels.paged_attention import pallas_gpu  # late, for the same reason

    return pallas_gpu.attend(*arguments)


BACKENDS = {
    "xla": xla.attend,
    "cpu": cpu.attend,
    "pallas_tpu": _attend_tpu,
    "pallas_gpu": _attend_gpu,
}
_LAYOUTS = {"pallas_tpu": TpuPageLayout, "pallas_gpu": GpuPageLayout}
PAGE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
# Of these, what only the kernels for TPUs and GPUs read: chips that multiply fp8 have no use for scales.
ACCELERATOR_PAGE_DTYPES = ("float8_e4m3fn",)

# A narrower page fills no vector; a wider one wastes half of itself on most sequences.
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 512


def available_backends() -> tuple[str, ...]:
    """Names of the backends that run on this machine."""
    absent = set()
    if native_library() is None:
        absent.add("cpu")
    absent |= {f"pallas_{platform}" for platform in ("tpu", "gpu") if platform != jax.default_backend()}
    return tuple(name for name in BACKENDS if name not in absent)


def page_layout(backend: str, num_kv_heads: int, head_dim: int, page_size: int, dtype: str) -> PageLayout:
    """The layout `backend` wants for its pages; the layout then names its backend.

    On any machine there is one for `pallas_tpu` and for `pallas_gpu`, which are also compiled for chips that
    are not there.

    `dtype` is one of `PAGE_DTYPES`, those of `ACCELERATOR_PAGE_DTYPES` for these two alone. Raises ValueError
    for an unknown backend or dtype, or a page size that is not a power of two from 8 to 512.
    """
    if backend not in BACKENDS or (backend == "cpu" and native_library() is None):
        reason = f" ({why_absent()})" if backend == "cpu" else ""
        known = ", ".join(available_backends())
        raise ValueError(f"attention backend {backend!r} does not exist here{reason}; available: {known}")
    if dtype not in PAGE_DTYPES:
        raise ValueError(f"page dtype {dtype!r} is not one of {', '.join(PAGE_DTYPES)}")
    if dtype in ACCELERATOR_PAGE_DTYPES and backend not in _LAYOUTS:
        raise ValueError(f"page dtype {dtype!r} is for TPUs and GPUs: give int8 to backend {backend!r}")
    if page_size & (page_size - 1) or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE:
        raise ValueError(
            f"page_size is {page_size}; give a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}"
        )
    kind = _LAYOUTS.get(backend, PageLayout)
    return kind(backend, num_kv_heads, head_dim, page_size, np.dtype(dtype))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages | TpuPages,
    rows: Rows,
    groups: Groups,
    options: AttentionOptions,
    layout: PageLayout,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Write `k` and `v` into their pages, then attend.

    Args:
        q: [T, N, H] queries; N is a multiple of K.
        k, v: [T, K, H] keys and values of the same tokens.
        pages: one layer's pages.
        rows: which tokens belong to which sequence, and where its pages are.
        groups: which sequences share leading pages. They say what may be read once, never what comes out:
            the result is that of `Groups.none()`, to the bit where the backend adds in the same order in
            both (on TPUs and GPUs to rounding).
        options: static options.
        layout: where the pages came from; names the backend.
        sinks: f32[N], an extra logit a head that takes weight and gives no value (or None).

    Returns:
        out [T, N, H] in q's dtype (zero for padding tokens), and the pages with the new tokens written.

    Source: PagedAttention (Kwon et al. 2023), online softmax (Milakov and Gimelshein 2018), shared prefixes
    attended to once (Hydragen, Juravsky et al. 2024).
    """
    if q.shape[1] % layout.num_kv_heads:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {layout.num_kv_heads} KV heads")
    return BACKENDS[layout.backend](q, k, v, pages, rows, groups, options, layout, sinks)
