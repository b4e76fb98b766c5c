"""Regular expressions that end a completion: those whose matches are of bounded length, at bounded cost.

Text that may still become a match must not be given out, so a match's longest length has to be known; and a
pattern comes with a request, so what it can cost is bounded before it is run: the ways in which it can match
from one place are counted, and a pattern with more than `MAX_WAYS` is refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any

from engine.errors import RequestError

MAX_WAYS = 1024
MAX_WIDTH = 256
"""Characters of a pattern, and of what it matches."""

_SINGLE = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}
_REPEATS = {sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT}


class StopPattern:
    """A pattern that was found fit. `width`: characters of its longest match."""

    def __init__(self, text: str, compiled: re.Pattern[str], width: int):
        self.text = text
        self.width = width
        self._compiled = compiled

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, text: str) -> StopPattern:
        """Raises RequestError, saying why, for a pattern that is not one, matches nothing at all, has no
        longest match, looks around itself, or can match in too many ways."""
        if not 1 <= len(text) <= MAX_WIDTH:
            raise _refused(text, f"it must have 1 to {MAX_WIDTH} characters")
        try:
            tree = sre_parser.parse(text)
            compiled = re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise _refused(text, f"it is no regular expression of Python's: {error}") from error
        least, most = tree.getwidth()
        if least == 0:
            raise _refused(text, "it matches an empty text, so it would stop everything at once")
        if most > MAX_WIDTH:
            raise _refused(
                text, f"a match may be longer than {MAX_WIDTH} characters: bound its repeats, as in a{{1,20}}"
            )
        if _num_ways(tree, text) > MAX_WAYS:
            raise _refused(text, "it can match in too many ways: use fewer, or shorter, repeats")
        return cls(text, compiled, most)

    def find(self, text: str, num_old: int) -> tuple[int, int, str] | None:
        """(end, start, pattern) of the match that ends first beyond the first `num_old` characters, whatever
        the pieces in which the text came."""
        for end in range(num_old + 1, len(text) + 1):
            match = self._compiled.search(text, max(0, end - self.width), end)
            if match is not None:
                return match.end(), match.start(), self.text
        return None


def _num_ways(items: Any, text: str) -> int:
    """In how many ways the items can match from one place, at most."""
    ways = 1
    for operation, argument in items:
        if operation in _SINGLE:
            continue
        if operation is sre.SUBPATTERN:
            ways *= _num_ways(argument[-1], text)
        elif operation is sre.ATOMIC_GROUP:
            ways *= _num_ways(argument, text)
        elif operation is sre.BRANCH:
            ways *= sum(_num_ways(branch, text) for branch in argument[1])
        elif operation in _REPEATS:
            low, high, body = argument
            each, total = _num_ways(body, text), 0
            for count in range(low, min(high, MAX_WIDTH) + 1):
                total += each ** min(count, 16)  # beyond the bound it does not matter how far
                if total > MAX_WAYS:
                    break
            ways *= max(total, 1)
        else:
            raise _refused(
                text, f"{str(operation).lower()} is not supported: what is around a match is not looked at"
            )
        if ways > MAX_WAYS:
            return MAX_WAYS + 1
    return ways


def _refused(text: object, why: str) -> RequestError:
    shown = repr(text)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return RequestError("bad_sampling", f"sampling.stop_pattern is {shown}: {why}")
