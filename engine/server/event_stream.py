"""Answers as server-sent events. A client that goes away has its request's generator closed at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import Response
from pydantic import BaseModel

from engine.server.errors import ApiError, ErrorAnswer
from engine.server.generation import Begun, client_goes

DONE = b"data: [DONE]\n\n"


def data_event(value: BaseModel) -> bytes:
    """An event of what was set in a model, nulls included."""
    return b"data: " + value.model_dump_json(exclude_unset=True, by_alias=True).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that fails when its status is sent already."""
    return data_event(ErrorAnswer.model_validate(error.body))


class EventStream(Response):
    """Sends events as they come, until there are no more or the client goes away.

    source: what the events are made of; closed in any case, also where not one event was asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], source: Begun[Any]):
        # No proxy is to collect events before it passes them on.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._source):
            sending = asyncio.ensure_future(self._send(send))
            gone = asyncio.ensure_future(client_goes(receive))
            try:
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
            finally:
                sending.cancel()
                gone.cancel()
                await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
