"""Pages shared by content: prompts that begin alike compute and store their beginning once.

A full page is known by a hash that covers its tokens and, through its parent's hash, every token
before them and the salt. The hash only finds a page: a hit then compares the page's tokens, its salt
and which page it continues, so a collision can cost a miss and never a wrong answer.

A page that is not full, the last of a prompt or of a request that ended, is known too, by the page it
continues. Nobody shares it, for its owner may be writing behind its tokens; but the tokens that it has
in common with another request are copied into a page of that one's own. So is the beginning of a full page
that goes on differently.

Whose a page is, for a request with P = page_size:

    [0, num_shared_pages * P)             known here; other requests may hold the same pages: read only
    [num_shared_pages * P, num_computed)  the request's own, to be shared once the page is full
    [num_computed, len(page_ids) * P)     the request's own, being written

A holder of a page holds every page before it in the chain, and releases them together, last first.
So a page is never evicted before those that continue it, and what is known is always reachable. Pins keep
this order: they cover a chain from its first page on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.packed_tokens import NUM_BYTES
from engine.page_pool import PagePool
from engine.prefix_index import PrefixIndex
from engine.prefix_pins import PrefixPins
from engine.request import Request

HashPage = Callable[[bytes, bytes], bytes]
"""(the parent's hash, a page's packed tokens) -> the page's hash."""

_DIGEST_SIZE = 16


def root_hash(salt: str | None) -> bytes:
    """What the first page of a chain has for a parent. No salt and an empty one differ."""
    if salt is None:
        return bytes(_DIGEST_SIZE)
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_SIZE).digest()


def page_hash(parent: bytes, tokens: bytes) -> bytes:
    """Hash of one full page: covers its packed tokens and, through `parent`, all before it (16 bytes)."""
    return hashlib.blake2b(parent + tokens, digest_size=_DIGEST_SIZE).digest()


class _Known(NamedTuple):
    """One page whose content is known, with all that a hit has to verify."""

    page: int
    parent: int | None
    """The page it continues; None for the first of a chain."""
    tokens: bytes
    """Packed: those of the full page; or the first of a page that may be filled differently by its owner."""
    salt: str | None
    hash: bytes | None
    """None when the page is not full."""

    @property
    def prefix(self) -> int | tuple[str | None]:
        """What it continues, as a key."""
        return (self.salt,) if self.parent is None else self.parent


class PrefixCache:
    """Finds pages by content in `pool`, and lets the pool keep them while there is room.

    hash_page: how a page is hashed; only tests give another one, to force collisions.
    """

    def __init__(self, page_size: int, pool: PagePool, hash_page: HashPage = page_hash):
        if page_size < 1:
            raise ValueError(f"a page holds at least one token, not {page_size}")
        self.page_size = page_size
        self._pool = pool
        self._hash_page = hash_page
        self._by_hash: dict[bytes, _Known] = {}
        self._by_page: dict[int, _Known] = {}
        self._continuations = PrefixIndex()
        self._pins = PrefixPins(page_size, pool)

    @property
    def num_known(self) -> int:
        """Known pages, full or not."""
        return len(self._by_page)

    def knows(self, page: int) -> bool:
        """Whether it is a full page that may be shared."""
        return page in self._by_page and self._by_page[page].hash is not None

    def hashes(self, request: Request, num_pages: int) -> list[bytes]:
        """The hashes of at least the first `num_pages` full pages, computed once and kept on the request.

        Tokens never change once known, so neither do these, whatever happens to the pages.
        """
        hashes = request.page_hashes
        if len(hashes) < num_pages:
            size = self.page_size
            parent = hashes[-1] if hashes else root_hash(request.cache_salt)
            for index in range(len(hashes), num_pages):
                parent = self._hash_page(parent, request.packed_tokens(index * size, (index + 1) * size))
                hashes.append(parent)
        return hashes

    def match(self, request: Request, max_tokens: int) -> list[int]:
        """The longest known chain of pages that begins like the request, of at most `max_tokens` tokens.

        The pages are not held yet: `pool.share` them before anything else is allocated.
        """
        pages: list[int] = []
        max_pages = min(max_tokens, request.num_tokens) // self.page_size
        parent: int | None = None
        hashes = request.page_hashes
        for index in range(max_pages):
            if index == len(hashes):
                # One page at a time: a long prompt that misses at once is not hashed to its end.
                self.hashes(request, index + 1)
            known = self._by_hash.get(hashes[index])
            if known is None or not self._is_page(known, request, index, parent):
                break
            parent = known.page
            pages.append(parent)
        return pages

    def closest(self, pages: Sequence[int], tokens: bytes, salt: str | None) -> tuple[int, int]:
        """The known page that goes on from `pages` most like these packed tokens, and how many they have in
        common (0: there is none).

        What they have in common is computed. The page is not held yet: `pool.share` it until it is copied.
        """
        return self._continuations.closest(pages[-1] if pages else (salt,), tokens) or (0, 0)

    def insert(self, request: Request) -> bool:
        """Make the request's full computed pages known, and swap those known already for the known ones; true
        when its pages are not the same ones any more.

        The swap frees the double, and keeps every chain in one piece (see the module's docstring).
        """
        has_swapped = False
        pages = request.page_ids
        num_full = request.num_computed // self.page_size
        hashes = self.hashes(request, num_full)
        for index in range(request.num_shared_pages, num_full):
            page, parent = pages[index], pages[index - 1] if index else None
            known = self._by_hash.get(hashes[index])
            if known is None:
                self._remember(request, index, page, parent, hashes[index])
            elif self._is_page(known, request, index, parent):
                self._unlearn(page)
                self._pool.share([known.page])
                self._pool.release([page])
                pages[index] = known.page
                has_swapped = True
            else:
                break  # a collision: this page and what follows stay the request's own
            request.num_shared_pages = index + 1
        return has_swapped

    def insert_rest(self, request: Request) -> None:
        """Make what is computed behind the request's last full page known, so that others may copy it."""
        index = request.num_computed // self.page_size
        if request.num_computed % self.page_size and request.num_shared_pages == index:
            parent = request.page_ids[index - 1] if index else None
            self._remember(request, index, request.page_ids[index], parent, None)

    def pin(self, token_ids: Sequence[int], salt: str | None) -> None:
        """Evict the full pages of this prefix, those known and those to come, only after all that are not
        pinned. Pins add up; `release` undoes one."""

        def find(parent: int | None, of_page: bytes) -> int | None:
            return self._continuations.find((salt,) if parent is None else parent, of_page)

        self._pins.pin(token_ids, salt, find)

    def release(self, token_ids: Sequence[int], salt: str | None) -> None:
        """Undo one `pin`. Raises ValueError when this prefix is not pinned."""
        self._pins.release(token_ids, salt)

    def _is_page(self, known: _Known, request: Request, index: int, parent: int | None) -> bool:
        start = index * self.page_size
        return (
            known.parent == parent
            and known.salt == request.cache_salt
            and known.tokens == request.packed_tokens(start, start + self.page_size)
        )

    def _remember(
        self, request: Request, index: int, page: int, parent: int | None, digest: bytes | None
    ) -> None:
        self._unlearn(page)  # what was known of it while it was not full
        start = index * self.page_size
        stop = min(start + self.page_size, request.num_computed)
        tokens = request.packed_tokens(start, stop)
        known = _Known(page, parent, tokens, request.cache_salt, digest)
        self._by_page[page] = known
        self._continuations.add(known.prefix, tokens, page)
        self._pool.keep(page, self._forget)
        if digest is not None:
            self._by_hash[digest] = known
            self._pins.note(page, parent, tokens, request.cache_salt)

    def _unlearn(self, page: int) -> None:
        """Forget a held page that is not full: it is known by more tokens now, or is a double."""
        if page in self._by_page:
            self._forget(page)
            self._pool.give_up(page)

    def _forget(self, page: int) -> None:
        known = self._by_page.pop(page)
        self._continuations.remove(known.prefix, known.tokens, page)
        if known.hash is not None:
            del self._by_hash[known.hash]
            self._pins.forget(page)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every known page is findable and continues a known page."""
        self._pins.check_integrity()
        num_full = sum(known.hash is not None for known in self._by_page.values())
        if len(self._by_hash) != num_full or self._continuations.num_entries() != len(self._by_page):
            raise AssertionError("a hash and a page do not belong together")
        for page, known in self._by_page.items():
            if known.page != page:
                raise AssertionError(f"page {page} is known as {known.page}")
            if known.hash is not None and self._by_hash.get(known.hash) is not known:
                raise AssertionError(f"page {page} cannot be found by its hash")
            if (len(known.tokens) == self.page_size * NUM_BYTES) != (known.hash is not None):
                raise AssertionError(f"page {page} is known as full and is not, or the reverse")
            if known.parent is not None and known.parent not in self._by_page:
                raise AssertionError(f"page {page} continues a page that was evicted")
            if known.parent is not None and self._pool.num_holders(known.parent) < self._pool.num_holders(
                page
            ):
                raise AssertionError(f"page {page} is held by more than the page it continues")
