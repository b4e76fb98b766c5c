"""Prefixes that somebody knows will be wanted again: their pages are evicted after all others.

A pin is on token ids, so it may be made before the pages exist and it outlives their eviction. Pins nest and
add up: a page is pinned as long as one pinned prefix covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from engine.packed_tokens import pack_tokens
from engine.page_pool import PagePool


class PinnedPage:
    """One full page of pinned prefixes, below the page it continues."""

    __slots__ = ("below", "count", "num_ends", "page", "parent", "tokens")

    def __init__(self, parent: PinnedPage | None, tokens: bytes):
        self.parent = parent
        self.tokens = tokens
        self.count = 0
        """Pins that cover it."""
        self.num_ends = 0
        """Those of them that cover nothing behind it."""
        self.page: int | None = None
        """The page that holds it at the moment."""
        self.below: dict[bytes, PinnedPage] = {}


class PrefixPins:
    """The pinned prefixes of one page size as a tree of pages, and which pages of `pool` hold them."""

    def __init__(self, page_size: int, pool: PagePool):
        self._page_size = page_size
        self._pool = pool
        self._roots: dict[str | None, PinnedPage] = {}
        self._by_page: dict[int, PinnedPage] = {}

    def pin(
        self, token_ids: Sequence[int], salt: str | None, find: Callable[[int | None, bytes], int | None]
    ) -> None:
        """Count one pin more on each full page of a prefix, and pin those of its pages that are known.

        find: the known page that continues a page (None: that begins a prefix) with these tokens, if any.
        """
        node = self._roots.setdefault(salt, PinnedPage(None, b""))
        pages: list[int] = []
        is_known = True
        for tokens_of_page in self._pages(token_ids):
            below = node.below.get(tokens_of_page)
            if below is None:
                below = node.below[tokens_of_page] = PinnedPage(node, tokens_of_page)
            if below.page is None and is_known:
                below.page = find(node.page, tokens_of_page)
                if below.page is not None:
                    self._by_page[below.page] = below
            node = below
            node.count += 1
            is_known = node.page is not None
            if node.page is not None:
                pages.append(node.page)
        node.num_ends += 1
        self._pool.pin(pages)

    def release(self, token_ids: Sequence[int], salt: str | None) -> None:
        """Undo one `pin`. Raises ValueError, changing nothing, when exactly this prefix is not pinned."""
        nodes: list[PinnedPage] = []
        node = self._roots.get(salt)
        for tokens_of_page in self._pages(token_ids):
            node = node.below.get(tokens_of_page) if node is not None else None
            if node is not None:
                nodes.append(node)
        if node is None or node.num_ends == 0:
            raise ValueError(
                f"a prefix of {len(token_ids)} tokens is released but not pinned (what is pinned has "
                f"its first {len(nodes)} pages): release what was pinned, once"
            )
        node.num_ends -= 1
        # The deepest first, so that of a chain it is the first to be evicted.
        for node in reversed(nodes):
            node.count -= 1
            if node.count == 0:
                if node.page is not None:
                    del self._by_page[node.page]
                    self._pool.unpin(node.page)
                if node.parent is not None:
                    del node.parent.below[node.tokens]
        if not (root := self._roots[salt]).below and root.num_ends == 0:
            del self._roots[salt]

    def note(self, page: int, parent: int | None, tokens: bytes, salt: str | None) -> None:
        """A page has become known: pin it if a pinned prefix covers it."""
        if not self._roots:
            return
        above = self._roots.get(salt) if parent is None else self._by_page.get(parent)
        node = None if above is None else above.below.get(tokens)
        if node is not None:
            node.page = page
            self._by_page[page] = node
            self._pool.pin([page])

    def forget(self, page: int) -> None:
        """A page was evicted; the prefixes stay pinned."""
        node = self._by_page.pop(page, None)
        if node is not None:
            node.page = None

    def _pages(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        size = self._page_size
        for stop in range(size, len(token_ids) + 1, size):
            yield pack_tokens(token_ids[stop - size : stop])

    def check_integrity(self) -> None:
        """Raises AssertionError unless each pinned page is of a prefix that is pinned from its beginning."""
        if len(self._by_page) != self._pool.num_pinned:
            raise AssertionError("a page is pinned and no prefix says so")
        for page, node in self._by_page.items():
            parent = node.parent
            if node.page != page or node.count < 1 or parent is None:
                raise AssertionError(f"page {page} is pinned for a prefix that is not")
            if parent.below.get(node.tokens) is not node:
                raise AssertionError(f"page {page} is pinned for a prefix that was released")
            if parent.parent is not None and (parent.page is None or parent.count < node.count):
                raise AssertionError(f"page {page} is pinned and the page it continues is not")
