"""A small server that speaks as much of OpenAI's API as a router sees, and fails as it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COMPLETE = (
    b'{"object": "chat.completion", "model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
)


@dataclass
class SmallUpstream:
    """An ASGI app. `faults` are taken one a request: a status, or `hang`, `close` (after the headers),
    `break` (in its stream)."""

    name: str = "a"
    models: Sequence[str] = ("m",)
    key: str | None = None
    faults: list[int | str] = field(default_factory=list)
    num_events: int = 3
    event_seconds: float = 0.0
    is_well: bool = True
    redirect: str = "/"
    """Where its answers with an error say that their request should go."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    num_open: int = 0
    """Requests that are being answered."""
    num_events_sent: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"] == "/health":
            body = b'{"status": "ok"}' if self.is_well else b"{}"
            await _answer(send, 200 if self.is_well else 500, body)
        elif self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            await _answer(send, 401, b'{"error": {}}')
        elif scope["path"] == "/v1/models":
            models = [{"id": name, "object": "model", "owned_by": self.name} for name in self.models]
            await _answer(send, 200, json.dumps({"object": "list", "data": models}).encode())
        else:
            await self._generate(scope, headers, receive, send)

    async def _generate(self, scope: Any, headers: dict[str, str], receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(raw)
        self.seen.append({"path": scope["path"], "headers": headers, "body": body, "raw": raw})
        fault = self.faults.pop(0) if self.faults else None
        self.num_open += 1
        work = asyncio.create_task(self._answer(body, fault, send))
        gone = asyncio.create_task(_gone(receive))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        gone.cancel()
        await asyncio.wait({work, gone})
        self.num_open -= 1

    async def _answer(self, body: dict[str, Any], fault: int | str | None, send: Any) -> None:
        if isinstance(fault, int):
            headers = [(b"retry-after", b"7"), (b"location", self.redirect.encode())]
            await _answer(send, fault, b'{"error": {"message": "of the upstream"}}', *headers)
        elif fault == "hang":
            await asyncio.sleep(60)
        elif fault == "close":  # uvicorn closes a connection whose answer is not whole
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        elif body.get("stream"):
            await self._stream(body, fault, send)
        else:
            await _answer(send, 200, COMPLETE, (b"set-cookie", b"a=b"), (b"keep-alive", b"timeout=5"))

    async def _stream(self, body: dict[str, Any], fault: int | str | None, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"x-secret", b"internal")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(self.num_events):
            if fault == "break" and number == 2:
                return
            event = {"choices": [{"delta": {"content": f"word{number} "}}]}
            await send(_event(json.dumps(event)))
            self.num_events_sent += 1
            await asyncio.sleep(self.event_seconds)
        if (body.get("stream_options") or {}).get("include_usage"):
            await send(
                _event(json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6}}))
            )
        await send(_event("[DONE]"))
        await send({"type": "http.response.body", "body": b""})


async def _answer(send: Any, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Any, send: Any) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
