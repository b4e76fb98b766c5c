"""What a row is called: the value of a named column, or a hash of where it stands and what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.rows import Refused
from pipeline.strict_json import has_lone_surrogate

MAX_ID_CHARS = 512


def named_id(value: Any, column: str) -> str:
    """The id that a column's value gives: text as it is, an integer in decimal (so 7 and "7" are one id).

    Raises Refused with `null_value`, `wrong_type` or `bad_id`.
    """
    if value is None:
        raise Refused("null_value", f"id column {column!r} is null; give every row an id")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Refused(
            "wrong_type", f"id column {column!r} is a {type(value).__name__}; use text or an integer"
        )
    text = str(value)
    if not 1 <= len(text) <= MAX_ID_CHARS:
        raise Refused("bad_id", f"id column {column!r} has {len(text)} characters; use 1 to {MAX_ID_CHARS}")
    if has_lone_surrogate(text):
        raise Refused("lone_surrogate", f"id column {column!r} holds half of a surrogate pair; mend the id")
    return text


def content_id(source: str, row: int, content: Mapping[str, Any]) -> str:
    """32 hexadecimal digits from the source's name, the row's number in it and what makes its prompt.

    Stable under moving the whole input, reading other columns, and slicing a dataset differently. A row
    whose content changes gets another id.
    """
    described = json.dumps([source, row, content], sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> str:
    """Values that Parquet has and JSON has not: dates, decimals, bytes."""
    return f"{type(value).__name__}:{value.hex() if isinstance(value, bytes) else value}"
