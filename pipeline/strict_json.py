"""JSON as RFC 8259 has it, bounded, with one meaning: what Python's own parser lets pass is refused here.

Refused: NaN and Infinity, numbers that do not fit (1e999, integers of more than 640 digits), a key given
twice, nesting past a limit. The limits do not depend on the interpreter's recursion limit or on its
environment, so a line that is accepted once is accepted always.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# The lowest value of Python's own limit (PYTHONINTMAXSTRDIGITS), so that no environment changes the answer.
MAX_NUMBER_CHARS = 640

# Possessive, and with an unfinished string taken to the end, so that no text makes it go back: linear time.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_HIGH_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJson(Exception):
    """Text that is not acceptable JSON; `reason` is a reject code, the message says what to mend."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def loads(text: str, max_depth: int) -> Any:
    """The value of JSON `text`. Raises BadJson (`not_json`, `too_deep`, `bad_number`, `duplicate_key`)."""
    if text.count("[") + text.count("{") > max_depth:
        _check_depth(text, max_depth)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadJson(
            "not_json", f"not JSON at character {error.pos + 1}: {error.msg}; mend it or take it out"
        ) from error


def may_hold_surrogates(text: str) -> bool:
    """Whether JSON `text` spells code points that could be lone surrogates (a quick test, seldom true)."""
    return _HIGH_ESCAPE.search(text) is not None


def has_lone_surrogate(text: str) -> bool:
    """Whether `text` holds half of a surrogate pair, which no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def lone_surrogate_in(value: Any) -> bool:
    """Whether any string of a JSON value holds a surrogate that is no part of a pair."""
    if isinstance(value, str):
        return has_lone_surrogate(value)
    if isinstance(value, dict):
        return any(lone_surrogate_in(key) or lone_surrogate_in(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(lone_surrogate_in(item) for item in value)


def _check_depth(text: str, max_depth: int) -> None:
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub('""', text)):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > max_depth:
            raise BadJson("too_deep", f"nested deeper than {max_depth} levels (input.max_json_depth)")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadJson("duplicate_key", f"key {key[:80]!r} is given twice; keep one of them")
            seen.add(key)
    return result


def _int(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARS:
        raise BadJson("bad_number", f"an integer of {len(digits)} digits; write it as a string")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_NUMBER_CHARS else math.inf
    if math.isinf(value):
        raise BadJson("bad_number", f"number {digits[:40]} does not fit a double; write it as a string")
    return value


def _constant(name: str) -> float:
    raise BadJson("bad_number", f"{name} is not JSON; write null or a string")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_int, parse_float=_float, parse_constant=_constant
)
