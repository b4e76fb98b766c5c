"""The API keys of a server that is started from the command line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.server.keys import KeyRing

KEY_VARIABLE = "TIDEMILL_API_KEY"
"""An environment variable, because others can read command lines."""


def open_keys(path: str | None, *, required: bool, command: str) -> tuple[KeyRing, str | None]:
    """The keys of the file `path`, or new ones in memory, and the one that was made for this run: where one
    is required and there is none that anybody could know.

    Changes of keys are logged beside the file, in `<path>.audit.jsonl`.
    """
    from engine.server.audit import AuditLog
    from engine.server.keys import KeyRing

    given = os.environ.get(KEY_VARIABLE)
    known = {given: {"label": KEY_VARIABLE, "role": "admin"}} if given else {}
    keys = KeyRing(path, api_keys=known, audit=AuditLog(None if path is None else f"{path}.audit.jsonl"))
    if len(keys) or not required:
        return keys, None
    return keys, keys.generate_api_key(command, role="admin")


def told_once(secret: str, path: str | None) -> str:
    """The line with which a key that was made is told."""
    where = f"kept in {path}, by its hash" if path else "made for this run"
    return f"API key ({where}; it is not shown again): {secret}"
