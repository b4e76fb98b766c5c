"""Token sequences that continue a prefix, and which of them begins most like another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

from engine.packed_tokens import num_common_tokens


class PrefixIndex:
    """For each prefix (any key) the packed tokens that continue it, each with the page they lie in.

    They are kept in order. So of all that continue a prefix the one that has most tokens in common with
    another is next to where that one would stand: two comparisons after a binary search, however many.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, list[tuple[bytes, int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, prefix: Hashable, tokens: bytes, page: int) -> None:
        insort(self._entries.setdefault(prefix, []), (tokens, page))

    def remove(self, prefix: Hashable, tokens: bytes, page: int) -> None:
        """Raises KeyError when it is not there."""
        entries = self._entries[prefix]
        at = bisect_left(entries, (tokens, page))
        if at == len(entries) or entries[at] != (tokens, page):
            raise KeyError(f"page {page} does not continue {prefix!r} with {tokens}")
        del entries[at]
        if not entries:
            del self._entries[prefix]

    def find(self, prefix: Hashable, tokens: bytes) -> int | None:
        """A page with exactly these tokens."""
        entries = self._entries.get(prefix, ())
        at = bisect_left(entries, (tokens,))
        return entries[at][1] if at < len(entries) and entries[at][0] == tokens else None

    def closest(self, prefix: Hashable, tokens: bytes) -> tuple[int, int] | None:
        """The page whose tokens begin most like `tokens`, and how many they share; None if none."""
        entries = self._entries.get(prefix)
        if not entries:
            return None
        at = bisect_left(entries, (tokens,))
        best, best_len = 0, 0
        for known, page in entries[max(0, at - 1) : at + 1]:
            num_common = num_common_tokens(known, tokens)
            if num_common > best_len:
                best, best_len = page, num_common
        return (best, best_len) if best_len else None

    def num_entries(self) -> int:
        return sum(map(len, self._entries.values()))
