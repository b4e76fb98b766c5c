"""A real uvicorn server on the loopback, in a thread, for as long as a test needs it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


class ServerThread:
    """A server that has begun to start; `url` is its address."""

    def __init__(self, app: Any, **options: Any):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        options = {"ws": "none", "log_config": None, "timeout_graceful_shutdown": 2, **options}
        self._server = uvicorn.Server(uvicorn.Config(app, **options))
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        while not self._server.started:
            assert self._thread.is_alive(), "uvicorn did not start"
            time.sleep(0.002)

    def end(self) -> None:
        self._server.should_exit = True

    def join(self) -> None:
        self._thread.join(15)
        self._listener.close()
        assert not self._thread.is_alive(), "uvicorn did not end"


@contextmanager
def serving_all(*apps: Any, **options: Any) -> Iterator[list[str]]:
    """The URLs of `apps`, each behind a server of its own until the end of the block."""
    servers = [ServerThread(app, **options) for app in apps]
    try:
        for server in servers:
            server.wait()
        yield [server.url for server in servers]
    finally:
        for server in servers:  # together: each takes some 0.2 s
            server.end()
        for server in servers:
            server.join()


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """The URL of `app`, served until the end of the block."""
    with serving_all(app, **options) as (url,):
        yield url


def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not come to hold"
        time.sleep(0.01)
