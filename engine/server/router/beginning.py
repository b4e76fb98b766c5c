"""How a request's prompt begins, so that requests with the same template go to the replica that has it
cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_SYSTEM_ROLES = ("system", "developer")


def prompt_beginning(body: Mapping[str, Any], num_chars: int) -> bytes | None:
    """What of a request's prompt its place is decided by; None for none.

    The system messages (or `instructions`) and tools, whole, if there are some, for they are what a template
    puts in front; otherwise the first `num_chars` characters of the prompt. `body` is a client's: any shape
    is accepted.
    """
    if num_chars == 0:
        return None
    messages = body.get("messages", body.get("input"))
    front = [body["instructions"]] if body.get("instructions") else []
    if isinstance(messages, list):
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in _SYSTEM_ROLES:
                break
            front.append(message.get("content"))
    if front:
        return _text([body.get("tools"), front]).encode()
    prompt = messages if messages else body.get("prompt")
    if not prompt:
        return None
    return _text(prompt)[:num_chars].encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
