"""Ragged attention over paged keys and values.

Axes: `T` tokens in a step, `S` sequences, `P` pages, `N` query heads, `K` KV heads, `H` head dim.
"""

from kernels.paged_attention.api import ACCELERATOR_PAGE_DTYPES, attend, available_backends, page_layout
from kernels.paged_attention.layout import AttentionOptions, Groups, PageLayout, Pages, Rows

__all__ = [
    "ACCELERATOR_PAGE_DTYPES",
    "AttentionOptions",
    "Groups",
    "PageLayout",
    "Pages",
    "Rows",
    "attend",
    "available_backends",
    "page_layout",
]
