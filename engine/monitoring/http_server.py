"""A small HTTP server for metrics and the dashboard where no other one runs."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from engine.errors import ConfigError

# A client that does not send its request, or take the answer, in this time is left.
CLIENT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Page:
    """An answer of 200."""

    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[str], Page]
"""Makes the page for a query string, such as `after=3`."""


class MonitoringServer:
    """Serves GET and HEAD of `routes`, by path, from threads, until it is closed.

    port: 0 is any free one. option: what the user calls it, for errors.

    Raises:
        ConfigError: it cannot listen there; says why and what to do.
    """

    def __init__(self, host: str, port: int, *, option: str):
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ConfigError(f"{option}={port!r}: give a port from 0 (any free one) to 65535")
        try:
            self._server = _Server(host, port)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"{option}={port}: cannot listen on {host}:{port} ({reason}): choose another port, or 0 for "
                "any free one"
            ) from error
        self.host, self.port = host, self._server.server_address[1]
        self.routes = self._server.routes
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name=f"tidemill-http-{self.port}", daemon=True
        )
        self._thread.start()

    def url(self, path: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{path}"

    def close(self) -> None:
        """Stop listening; what is being answered is answered."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int):
        self.routes: dict[str, Route] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the name service for this machine's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away while it is answered is no news; what else goes wrong is printed."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS
    server_version, sys_version = "tidemill", ""

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, has_body: bool) -> None:
        path, _, query = self.path.partition("?")
        assert isinstance(self.server, _Server)
        route = self.server.routes.get(path)
        if route is None:
            self.send_error(404)
            return
        page = route(query)
        self.send_response(200)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        for name, value in page.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes come every few seconds: nothing is printed of them."""
