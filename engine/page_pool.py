"""The pool of KV pages: which are free, cached or held, and which cached one is given up next.

A page is in exactly one state:

    free    nobody needs what it holds
    cached  nobody holds it, but what it holds may be wanted again: it waits in LRU order
    held    one or more requests hold it (its reference count says how many)

so free + cached + held = num_pages, always. Of the cached ones those that are pinned, because somebody
knows that they will be wanted, wait in a queue of their own: they go when no other is left.

Only page numbers live here, never their contents.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class PagePool:
    """Reference-counted pages 0 .. num_pages - 1 with LRU eviction of those cached and not held."""

    def __init__(self, num_pages: int, max_cached: int | None = None):
        """max_cached: most pages that are cached at a time; None: no bound."""
        if num_pages < 1:
            raise ValueError(f"a page pool needs at least one page, not {num_pages}")
        self._max_cached = max_cached
        self.num_pages = num_pages
        self.num_evictions = 0
        self._num_holders = [0] * num_pages
        # A stack: what was released last is handed out first, while a CPU's caches still hold it.
        self._free = list(range(num_pages - 1, -1, -1))
        # Oldest release first. To find the first entry of a plain dict, all that were deleted before it are
        # passed.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._cached_pinned: OrderedDict[int, None] = OrderedDict()
        self._pinned: set[int] = set()
        # Pages whose content is known, held or not, with whom to tell when the content is given up.
        self._forget: dict[int, Callable[[int], None]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached) + len(self._cached_pinned)

    @property
    def num_pinned(self) -> int:
        """Pages that are pinned, cached or held."""
        return len(self._pinned)

    @property
    def num_cached_pinned(self) -> int:
        """Those of the cached pages that are pinned."""
        return len(self._cached_pinned)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones, and cached ones after eviction."""
        return len(self._free) + len(self._cached) + len(self._cached_pinned)

    def num_holders(self, page: int) -> int:
        return self._num_holders[page]

    def is_held(self, page: int) -> bool:
        return self._num_holders[page] > 0

    def is_cached_pinned(self, page: int) -> bool:
        return page in self._cached_pinned

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` pages with one holder each. Free pages go first, then the cached that are not pinned,
        oldest release first, then the pinned.

        Raises ValueError, changing nothing, when fewer than that are available: callers look first.
        """
        if not 0 <= num_pages <= self.num_available:
            raise ValueError(f"{num_pages} pages asked for, {self.num_available} available")
        pages = []
        for _ in range(num_pages):
            page = self._free.pop() if self._free else self._evict_oldest()
            self._num_holders[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these held or cached pages."""
        for page in pages:
            if self._num_holders[page] == 0:
                queue = self._cached_pinned if page in self._pinned else self._cached
                if page not in queue:
                    raise ValueError(f"page {page} is free: there is nothing in it to share")
                del queue[page]
            self._num_holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each of a request's pages, given in the order of its tokens.

        They are let go from last to first, so that of a chain of cached pages the deepest is evicted
        first: without its head a chain cannot be found again.
        """
        for page in reversed(pages):
            if self._num_holders[page] < 1:
                raise ValueError(f"page {page} is released but nobody holds it")
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                if page in self._pinned:
                    self._cached_pinned[page] = None
                elif page in self._forget:
                    self._cached[page] = None
                else:
                    self._free.append(page)
        if self._max_cached is not None:
            self._evict_down_to(self._max_cached)

    def evict_all(self) -> None:
        """Give up what every cached page holds: all pages that nobody holds are free."""
        self._evict_down_to(0)

    def keep(self, page: int, forget: Callable[[int], None]) -> None:
        """Keep a held page's content after its release; `forget(page)` is called when its room is needed."""
        if self._num_holders[page] < 1:
            raise ValueError(f"page {page} is to be kept but nobody holds it")
        self._forget[page] = forget

    def give_up(self, page: int) -> None:
        """A held page's content is not to be kept any more; nobody is told."""
        if self._num_holders[page] < 1 or page not in self._forget or page in self._pinned:
            raise ValueError(f"page {page} is not held and kept without a pin")
        del self._forget[page]

    def pin(self, pages: Sequence[int]) -> None:
        """Keep pages whose content is kept until there is nothing else to evict.

        They are the beginning of a chain, in the order of its tokens; some may be pinned already. Those that
        nobody holds now count as released last, the deepest first.
        """
        for page in reversed(pages):
            if page not in self._forget:
                raise ValueError(f"page {page} is to be pinned but its content is not kept")
            if self._num_holders[page] == 0:
                del (self._cached_pinned if page in self._pinned else self._cached)[page]
                self._cached_pinned[page] = None
            self._pinned.add(page)

    def unpin(self, page: int) -> None:
        """Undo `pin`. If nobody holds the page, it now counts as released last."""
        if page not in self._pinned:
            raise ValueError(f"page {page} is not pinned")
        self._pinned.remove(page)
        if self._num_holders[page] == 0:
            del self._cached_pinned[page]
            self._cached[page] = None

    def _evict_down_to(self, num_cached: int) -> None:
        while self.num_cached > num_cached:
            self._free.append(self._evict_oldest())

    def _evict_oldest(self) -> int:
        queue = self._cached or self._cached_pinned
        page, _ = queue.popitem(last=False)
        self._pinned.discard(page)
        self._forget.pop(page)(page)
        self.num_evictions += 1
        return page

    def check_integrity(self) -> None:
        """Raises AssertionError unless each page is in exactly one state and its count agrees with it."""
        held = {page for page, count in enumerate(self._num_holders) if count > 0}
        free, cached = set(self._free), self._cached.keys() | self._cached_pinned.keys()
        if len(free) != len(self._free):
            raise AssertionError("a page is free twice")
        if free & cached or free & held or cached & held:
            raise AssertionError("a page is in two states")
        if len(free) + len(cached) + len(held) != self.num_pages:
            raise AssertionError("a page is in no state")
        if any(count < 0 for count in self._num_holders):
            raise AssertionError("a page has fewer than no holders")
        if not cached <= self._forget.keys() or self._forget.keys() & free:
            raise AssertionError("a cached page is not kept, or a kept page is free")
        if not self._pinned <= self._forget.keys():
            raise AssertionError("a pinned page is not kept")
        if self._pinned - held != self._cached_pinned.keys() or self._pinned & self._cached.keys():
            raise AssertionError("a cached page is in the wrong queue")
