"""Token sequences that continue a prefix, and which of them begins most like another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

Tokens = tuple[int, ...]


class PrefixIndex:
    """For each prefix (any key) the sequences that continue it, each with the page it lies in.

    They are kept in order. So of all that continue a prefix the one that has most tokens in common with
    another is next to where that one would stand: two comparisons after a binary search, however many.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, list[tuple[Tokens, int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, prefix: Hashable, token_ids: Tokens, page: int) -> None:
        insort(self._entries.setdefault(prefix, []), (token_ids, page))

    def remove(self, prefix: Hashable, token_ids: Tokens, page: int) -> None:
        """Raises KeyError when it is not there."""
        entries = self._entries[prefix]
        at = bisect_left(entries, (token_ids, page))
        if at == len(entries) or entries[at] != (token_ids, page):
            raise KeyError(f"page {page} does not continue {prefix!r} with {token_ids}")
        del entries[at]
        if not entries:
            del self._entries[prefix]

    def find(self, prefix: Hashable, token_ids: Tokens) -> int | None:
        """A page with exactly these tokens."""
        entries = self._entries.get(prefix, ())
        at = bisect_left(entries, (token_ids,))
        return entries[at][1] if at < len(entries) and entries[at][0] == token_ids else None

    def closest(self, prefix: Hashable, token_ids: Tokens) -> tuple[int, int] | None:
        """The page whose tokens begin most like `token_ids`, and how many they share; None if none."""
        entries = self._entries.get(prefix)
        if not entries:
            return None
        at = bisect_left(entries, (token_ids,))
        best, best_len = 0, 0
        for known, page in entries[max(0, at - 1) : at + 1]:
            num_common = num_common_tokens(known, token_ids)
            if num_common > best_len:
                best, best_len = page, num_common
        return (best, best_len) if best_len else None

    def num_entries(self) -> int:
        return sum(map(len, self._entries.values()))


def num_common_tokens(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
