"""Answers that are given before a request reaches an endpoint, in OpenAI's error format, for any ASGI app."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer: HTTP status, and what OpenAI's clients read of the body."""

    status: int
    message: str
    type: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        headers = {
            "content-type": "application/json",
            "content-length": str(len(self.body())),
            **self.headers,
        }
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def refuse(scope: Scope, send: Send, refusal: Refusal) -> None:
    """Answer a request with `refusal`; a websocket is closed before it opens, which is a 403 to its
    client."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.code})
        return
    await send({"type": "http.response.start", "status": refusal.status, "headers": refusal.raw_headers()})
    await send({"type": "http.response.body", "body": refusal.body()})
