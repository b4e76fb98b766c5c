"""Finding markers in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def first_marker(text: str, markers: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """Where the first of the markers is, from `start` on, and which: of several at one place the longest."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker, start)) >= 0]
    if not found:
        return None
    at, _, marker = min(found)
    return at, marker


def num_certain(text: str, markers: Sequence[str]) -> int:
    """Characters at the front of `text` that are no part of a marker, whatever comes next.

    `text` has none of the markers as a whole.
    """
    held = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), held, -1):
            if text.endswith(marker[:length]):
                held = length
                break
    return len(text) - held


def may_begin_with(text: str, markers: Sequence[str]) -> bool:
    """`text` begins with one of the markers, or may when more of it has come."""
    return any(text.startswith(marker) or marker.startswith(text) for marker in markers)
