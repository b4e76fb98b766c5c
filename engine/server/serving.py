"""An app behind uvicorn: a socket bound first, a graceful end, in this thread or beside it.

At SIGTERM or Ctrl-C nothing new is accepted; open calls have `drain_seconds` to end, then they are aborted.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import threading
from collections.abc import Callable
from types import TracebackType

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from engine.errors import ConfigError
from engine.server.connections import uvicorn_options
from engine.server.served import ServedModels
from engine.server.settings import ServerSettings


def serve(
    app: FastAPI,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until a signal ends it. `on_ready` is told the URL once calls are accepted; port 0 is any free.

    Raises ConfigError for an address that cannot be taken, or must not be without keys. A signal that ended
    it is raised again at the end, for whoever handles it in this process.
    """
    with bound_socket(host, port, settings) as listening:
        url = url_of(host, listening)
        _Server(app, settings, lambda: on_ready(url) if on_ready else None).run(sockets=[listening])


class BackgroundServer:
    """The same in a thread of its own: a context manager that has a `url` while it runs."""

    def __init__(self, app: FastAPI, settings: ServerSettings, *, host: str = "127.0.0.1", port: int = 0):
        self._socket = bound_socket(host, port, settings)
        self.url = url_of(host, self._socket)
        self._is_ready = threading.Event()
        self._server = _Server(app, settings, self._is_ready.set)
        self._thread = threading.Thread(target=self._run, name="tidemill-server", daemon=True)

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        self._is_ready.wait()
        if not self._server.started:
            self.stop()
            raise ConfigError("the server did not start: its log says why")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End gracefully, and wait for it."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._is_ready.set()  # whoever waits for a server that failed


def bound_socket(host: str, port: int, settings: ServerSettings) -> socket.socket:
    """A socket that is bound and does not listen yet. Raises ConfigError."""
    if not (settings.require_api_key or settings.open_to_all or _is_loopback(host)):
        raise ConfigError(
            f"host {host} can be reached by others and no key is required: set require_api_key, or "
            "server.open_to_all=true where something else guards it"
        )
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another host or port") from error
    return listening


def url_of(host: str, listening: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_LAST_WORDS_SECONDS = 2
"""For answers that say they were aborted to be sent."""


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, settings: ServerSettings, on_ready: Callable[[], None]):
        config = uvicorn.Config(
            app,
            lifespan="on",
            # uvloop accepts one connection a turn: with many, each waits for half a second.
            loop="asyncio",
            log_level="warning",
            access_log=False,  # it shows query strings, which may hold keys
            timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + _LAST_WORDS_SECONDS,
            **uvicorn_options(settings),
        )
        super().__init__(config)
        self._models: ServedModels | None = getattr(app.state, "models", None)  # a router has none
        self._drain_seconds = settings.drain_seconds
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        aborting = asyncio.ensure_future(self._abort_later())
        try:
            await super().shutdown(sockets)
        finally:
            aborting.cancel()

    async def _abort_later(self) -> None:
        """When the drain is over, end what still runs with an answer that says so."""
        await asyncio.sleep(self._drain_seconds)
        if self._models is not None:
            await run_in_threadpool(self._models.close)
