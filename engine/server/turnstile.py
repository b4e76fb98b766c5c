"""New requests one after the other, however many come at once.

Until it first waits for something, a request keeps the event loop: its body is read, checked and made a call
of the engine. Clients that all come at once, as those do whose answers end with the same step, would keep it
for the sum of that, and a question for the server's health, or a stream's next piece, with them.
"""

from __future__ import annotations

import asyncio
from collections import deque

from engine.server.refusals import AsgiApp, Receive, Scope, Send

_PER_TURN = 1
"""Requests that begin in one turn of an event loop."""


class Turnstile:
    """ASGI middleware: requests with a body begin in the order in which they came, `_PER_TURN` in each turn
    of the event loop."""

    def __init__(self, app: AsgiApp):
        self._app = app
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_begun = 0  # in this turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            await self._my_turn()
        await self._app(scope, receive, send)

    async def _my_turn(self) -> None:
        loop = asyncio.get_running_loop()
        if self._num_begun == 0:
            loop.call_soon(self._next_turn, loop)
        if self._num_begun < _PER_TURN:
            self._num_begun += 1
            return
        waiting = loop.create_future()
        self._waiting.append(waiting)
        await waiting

    def _next_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_begun = 0
        while self._waiting and self._num_begun < _PER_TURN:
            waiting = self._waiting.popleft()
            if not waiting.done():  # its client may have gone
                waiting.set_result(None)
                self._num_begun += 1
        if self._num_begun:
            loop.call_soon(self._next_turn, loop)
