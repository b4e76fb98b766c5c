"""Count how many prompt tokens a run could take from earlier prompts' pages, in bounded memory."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

# About 100 bytes each: 400 MB at most, for 4 million different pages.
MAX_PAGES = 4_000_000


class SharedPrefixes:
    """Remembers each different page by a hash of the whole prefix that ends with it.

    A page counts as shared when an earlier prompt began with the same tokens up to its end. Only whole pages
    count, and never a prompt's last token, which is always computed for its logits. What is counted is what a
    cache that never evicts would save; past `max_pages` different pages it is a lower bound.
    """

    def __init__(self, page_size: int, max_pages: int = MAX_PAGES):
        self._page_size = page_size
        self._max_pages = max_pages
        self._seen: set[bytes] = set()
        self.num_tokens = 0
        self.num_shared = 0
        self.is_exact = True

    def add(self, token_ids: Sequence[int]) -> int:
        """Count one prompt; returns how many of its tokens earlier prompts hold."""
        self.num_tokens += len(token_ids)
        raw = array("I", token_ids)
        chain, shared = b"", 0
        for start in range(0, len(token_ids) - self._page_size, self._page_size):
            page = raw[start : start + self._page_size].tobytes()
            chain = hashlib.blake2b(chain + page, digest_size=16).digest()
            if chain in self._seen:
                shared += self._page_size
            elif len(self._seen) < self._max_pages:
                self._seen.add(chain)
            else:
                self.is_exact = False
        self.num_shared += shared
        return shared

    @property
    def share(self) -> float:
        return self.num_shared / self.num_tokens if self.num_tokens else 0.0
