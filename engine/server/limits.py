"""What a request may be before an endpoint sees it: size of headers and body, nesting of JSON, and time.

Bodies are checked as they come, with or without a Content-Length, so nothing is held that will be refused.
What only the connection can see, headers that come slowly and answers that are not taken, is in
`engine.server.connections`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.server.json_depth import JsonDepth
from engine.server.refusals import AsgiApp, Message, Receive, Refusal, Scope, Send, refuse
from engine.server.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_JSON_DEPTH = 64
MIN_BYTES_PER_SECOND = 64 << 10
"""A body that comes at least as fast may take longer than `body_timeout_s`."""
GRACE_SECONDS = 5.0
LINGER_SECONDS = 2.0
LINGER_BYTES = 16 << 20


def install_limits(
    app: FastAPI,
    settings: ServerSettings,
    *,
    max_body_bytes: Mapping[str, int] | None = None,
    grace_s: float = GRACE_SECONDS,
) -> None:
    """Refuse what is over the limits of `settings`; `max_body_bytes` holds those of single paths (uploads).

    A request still unfinished `grace_s` after its time is cut off: the endpoint had that long to end it in
    order.
    """
    app.add_middleware(LimitsMiddleware, settings=settings, max_body_bytes=max_body_bytes, grace_s=grace_s)


class LimitsMiddleware:
    """ASGI middleware of `install_limits`, for apps that are not FastAPI's too."""

    def __init__(
        self,
        app: AsgiApp,
        *,
        settings: ServerSettings,
        max_body_bytes: Mapping[str, int] | None = None,
        grace_s: float = GRACE_SECONDS,
    ):
        self._app = app
        self._settings = settings
        self._max_body_bytes = dict(max_body_bytes or {})
        self._grace_s = grace_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._max_body_bytes.get(scope["path"], self._settings.max_body_bytes)
        refusal = self._refused_by_headers(scope, max_bytes)
        if refusal is not None:
            await _refuse_and_drain(scope, receive, send, refusal)
            return
        body = _Body(scope, receive, max_bytes, self._settings.body_timeout_s)
        answer = _Answer(body, send)
        time_limit = asyncio.timeout(self._settings.request_timeout_s + self._grace_s)
        try:
            async with time_limit:
                await self._app(scope, body.receive, answer.send)
        except Exception:
            if time_limit.expired():
                if not answer.started:
                    await refuse(scope, send, _timed_out(self._settings.request_timeout_s))
                return  # the server closes the connection of an answer that has no end: its client can tell
            if body.refusal is None:  # otherwise it is what comes of a body that was cut off
                raise
        if body.refusal is not None and not answer.started:
            if body.refusal.status == 408:  # the rest of it would be as slow
                await refuse(scope, send, body.refusal)
            else:
                await _refuse_and_drain(scope, receive, send, body.refusal)

    def _refused_by_headers(self, scope: Scope, max_bytes: int) -> Refusal | None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        size += len(scope["path"]) + len(scope.get("query_string", b""))
        if size > self._settings.max_header_bytes:
            most = self._settings.max_header_bytes
            return Refusal(
                431, f"The headers are over {most} bytes.", "invalid_request_error", "headers_too_large"
            )
        lengths = {value for name, value in scope["headers"] if name == b"content-length"}
        if len(lengths) > 1 or not all(value.isdigit() and len(value) < 20 for value in lengths):
            return Refusal(400, "Content-Length is not one number.", "invalid_request_error", "bad_length")
        if lengths and int(lengths.pop()) > max_bytes:
            return _too_large(max_bytes)
        for name, value in scope["headers"]:
            if name == b"content-encoding" and value.strip().lower() != b"identity":
                message = "Compressed bodies are not taken: send the body without Content-Encoding."
                return Refusal(415, message, "invalid_request_error", "unsupported_encoding")
        return None


class _Body:
    """A request's body as it is received: counted, timed, and its JSON's nesting watched."""

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, timeout_s: float):
        self.refusal: Refusal | None = None
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._num_bytes = 0
        self._waited_s = 0.0
        self._complete = False
        content_type = dict(scope["headers"]).get(b"content-type", b"").lower()
        self._depth = None if content_type.startswith(b"multipart/") else JsonDepth(MAX_JSON_DEPTH)

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        if self._complete:
            return await self._receive()
        message = await self._next()
        if message is None:
            message = {"type": "http.disconnect"}
        elif message["type"] == "http.request":
            self._check(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self.refusal is not None:
                return {"type": "http.disconnect"}
        return message

    async def _next(self) -> Message | None:
        """The next message, unless the body has been slow for too long."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        left = self._timeout_s + self._num_bytes / MIN_BYTES_PER_SECOND - self._waited_s
        try:
            async with asyncio.timeout(max(0.0, left)):
                return await self._receive()
        except TimeoutError:
            message = f"The body did not come within {self._timeout_s:g} s (server.body_timeout_s)."
            headers = {"connection": "close"}
            self.refusal = Refusal(408, message, "invalid_request_error", "request_timeout", headers)
            return None
        finally:
            self._waited_s += loop.time() - began

    def _check(self, chunk: bytes) -> None:
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            self.refusal = _too_large(self._max_bytes)
        elif self._depth is not None and self._depth.is_exceeded_by(chunk):
            message = f"The body nests arrays and objects deeper than {MAX_JSON_DEPTH}."
            self.refusal = Refusal(400, message, "invalid_request_error", "too_deep")


class _Answer:
    """An app's answer, held back where the body it was made from has been refused."""

    def __init__(self, body: _Body, send: Send):
        self.started = False
        self._body = body
        self._send = send

    async def send(self, message: Message) -> None:
        if not self.started and self._body.refusal is not None:
            return
        self.started = True
        await self._send(message)


async def _refuse_and_drain(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    """Answer, then take a bounded rest of the body, so that a client that is still sending gets to read the
    answer."""
    headers = list(dict([*refusal.raw_headers(), (b"connection", b"close")]).items())
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body(), "more_body": True})
    num_bytes = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while num_bytes < LINGER_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass  # who sends that slowly is cut off
    await send({"type": "http.response.body", "body": b""})


def _timed_out(seconds: float) -> Refusal:
    message = f"The request was not finished within {seconds:g} s (server.request_timeout_s)."
    return Refusal(504, message, "server_error", "request_timeout")


def _too_large(max_bytes: int) -> Refusal:
    message = f"The body is over {max_bytes} bytes."
    return Refusal(413, message, "invalid_request_error", "body_too_large")
