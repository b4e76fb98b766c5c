"""An ASGI app in this process as an httpx transport that streams: httpx's own waits for the whole answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx

from engine.server.refusals import AsgiApp, Message

ASGI_STATE = "asgi_state"
"""The request extension whose value becomes the scope's state."""
PATIENCE_SECONDS = 5.0
"""An app that goes on for longer although its client is gone is cancelled."""

_log = logging.getLogger(__name__)
_RUNNING: set[asyncio.Task[None]] = set()  # asyncio itself holds tasks weakly


class StreamingAsgiTransport(httpx.AsyncBaseTransport):
    """Calls `app` for each request, in a task that is ahead of its reader by one message.

    Closing a response before its end tells the app that its client is gone and waits for it to end.
    """

    def __init__(self, app: AsgiApp):
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        call = _Call(self._app, _scope(request), body)
        try:
            start = await call.next_message()
            if start is None or start["type"] != "http.response.start":
                raise httpx.RemoteProtocolError("the app ended without an answer", request=request)
        except BaseException:
            await call.aclose()
            raise
        return httpx.Response(start["status"], headers=start.get("headers", []), stream=call)


class _Call(httpx.AsyncByteStream):
    """One call of an app; iterating gives the bytes of its answer."""

    def __init__(self, app: AsgiApp, scope: dict[str, Any], body: bytes):
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(1)
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self._complete = False
        self._task = asyncio.create_task(self._run(app, scope))
        _RUNNING.add(self._task)
        self._task.add_done_callback(_ended)

    async def next_message(self) -> Message | None:
        """The app's next message; None after the last. Raises what the app raises."""
        message = await self._messages.get()
        if message is None and not self._complete:
            await asyncio.wait({self._task})
            raise httpx.RemoteProtocolError("the app failed") from self._task.exception()
        return message

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self.next_message()) is not None:
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return

    async def aclose(self) -> None:
        self._gone.set()
        if self._complete:  # what the app does after its answer is its own affair
            return
        loop = asyncio.get_running_loop()
        patience_ends = loop.time() + PATIENCE_SECONDS
        while not self._task.done():
            while not self._messages.empty():  # it may wait for room to tell what nobody hears
                self._messages.get_nowait()
            if loop.time() > patience_ends:
                self._task.cancel()
            await asyncio.wait({self._task}, timeout=0.01)

    async def _run(self, app: AsgiApp, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
        finally:
            if not self._gone.is_set():
                await self._messages.put(None)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._gone.is_set():
            return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True
        await self._messages.put(message)


def _ended(task: asyncio.Task[None]) -> None:
    _RUNNING.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("an app in this process failed", exc_info=error)


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.partition(b"?")[0],
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 0),
        "server": (request.url.host, request.url.port),
        "state": dict(request.extensions.get(ASGI_STATE, {})),
    }
