"""Connections that keep the server waiting: uvicorn's HTTP protocol with the time limits that it leaves out.

uvicorn (0.40 to 0.51) waits for ever for the end of a request's headers, for the rest of a body that nobody
reads any more, and for a client that does not take its answer, and counts connections only when a request is
whole. Here each of these has a limit. A connection that waits costs a socket and a timer, no thread and no
task.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.server.refusals import Refusal
from engine.server.settings import ServerSettings

if TYPE_CHECKING:
    from uvicorn.config import Config

_log = logging.getLogger(__name__)
_NUMBERS = itertools.count()


def uvicorn_options(settings: ServerSettings) -> dict[str, Any]:
    """Keyword arguments of `uvicorn.Config` with which a server holds `settings`."""

    class Connection(BoundedConnection):
        limits = settings

    return {
        "http": Connection,
        "ws": "none",
        "h11_max_incomplete_event_size": settings.max_header_bytes,
        "server_header": False,
        "proxy_headers": False,  # the address of a client is what it connects from, not what it says
    }


class BoundedConnection(H11Protocol):
    """One connection. `limits` is set by the subclass that `uvicorn_options` makes."""

    limits: ServerSettings

    def __init__(self, config: Config, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self._owed_timer: asyncio.TimerHandle | None = None  # the client owes a request, or the rest of one
        self._number = next(_NUMBERS)
        self._take_timer: asyncio.TimerHandle | None = None  # the client takes nothing of what is sent

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections and not self._make_room():
            self._answer_and_close(
                Refusal(503, "The server has no connection left.", "server_error", "too_many_connections")
            )
            return
        self._watch_what_is_owed()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_owed_timer()
        self._stop_take_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_what_is_owed()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._owes_nothing_yet():  # until its next request begins uvicorn's keep-alive timer watches it
            self._stop_owed_timer()
        else:
            self._watch_what_is_owed()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._take_timer is None:
            self._take_timer = self.loop.call_later(
                self.limits.send_timeout_s, self._cut_off, "takes no answer"
            )

    def resume_writing(self) -> None:
        self._stop_take_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if len(self.conn.trailing_data[0]) > self.limits.max_header_bytes:
            most = self.limits.max_header_bytes
            refusal = Refusal(
                431, f"The headers are over {most} bytes.", "invalid_request_error", "headers_too_large"
            )
        else:
            refusal = Refusal(400, msg, "invalid_request_error", "bad_request")
        self._answer_and_close(refusal)

    @property
    def is_idle(self) -> bool:
        """Whether no request of this connection is being worked on."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _waits_since(self) -> tuple[float, int]:
        """What connections are ordered by, the longest waiting first; a loop's clock may tell only
        milliseconds."""
        return self._owed_timer.when() if self._owed_timer else 0.0, self._number

    def _owes_nothing_yet(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _watch_what_is_owed(self) -> None:
        """Start or stop the timer. Once started, more bytes of the same thing do not start it anew."""
        owes_headers = self.conn.their_state is h11.IDLE and self.is_idle
        owes_rest = self.conn.their_state is h11.SEND_BODY and self.is_idle
        if not (owes_headers or owes_rest) or self.transport.is_closing():
            self._stop_owed_timer()
        elif self._owed_timer is None:
            self._owed_timer = self.loop.call_later(self.limits.header_timeout_s, self._give_up)

    def _give_up(self) -> None:
        self._owed_timer = None
        if self.conn.our_state is h11.IDLE and self.conn.their_state is h11.IDLE:
            seconds = self.limits.header_timeout_s
            message = f"The headers did not come within {seconds:g} s (server.header_timeout_s)."
            self._answer_and_close(Refusal(408, message, "invalid_request_error", "request_timeout"))
        else:
            self._cut_off("sends a body that was refused")

    def _make_room(self) -> bool:
        """Cut off the connection that has kept the server waiting for the longest time, if one does."""
        idle = [
            each
            for each in self.connections
            if isinstance(each, BoundedConnection) and each is not self and each.is_idle
        ]
        if not idle:
            return False
        longest = min(idle, key=lambda each: each._waits_since)
        longest._cut_off("waits while others come")
        return True

    def _cut_off(self, why: str) -> None:
        _log.info("connection of %s cut off: it %s", self.client[0] if self.client else "a client", why)
        self.transport.abort()

    def _answer_and_close(self, refusal: Refusal) -> None:
        """Answer in the place of an app: no request has come whole."""
        headers = [*refusal.raw_headers(), (b"connection", b"close")]
        reason = b"Refused"
        parts = [
            h11.Response(status_code=refusal.status, headers=headers, reason=reason),
            h11.Data(data=refusal.body()),
            h11.EndOfMessage(),
        ]
        for part in parts:
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()

    def _stop_owed_timer(self) -> None:
        if self._owed_timer is not None:
            self._owed_timer.cancel()
            self._owed_timer = None

    def _stop_take_timer(self) -> None:
        if self._take_timer is not None:
            self._take_timer.cancel()
            self._take_timer = None
