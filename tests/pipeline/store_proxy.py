"""A proxy before a store that does to a request what networks and stores do: answer with an error, cut the
connection before the store has seen it, or after (the answer is lost).
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Fault:
    """status: the answer in the store's place, with the S3 error `code`; None cuts the connection.
    is_applied: the request reaches the store before that.
    """

    status: int | None = None
    code: str = "InternalError"
    is_applied: bool = False


THROTTLED, TOO_MANY = Fault(503, "SlowDown"), Fault(429, "TooManyRequests")
DOWN, BAD_GATEWAY, CONFLICT = Fault(500), Fault(502), Fault(409, "ConditionalRequestConflict")
CUT, LOST = Fault(), Fault(is_applied=True)
LOST_IN_ERROR = Fault(500, is_applied=True)
EVERY_FAULT = (THROTTLED, TOO_MANY, DOWN, BAD_GATEWAY, CONFLICT, CUT, LOST, LOST_IN_ERROR)


@dataclass(frozen=True, slots=True)
class Asked:
    method: str
    path: str
    authorization: str


Decide = Callable[[Asked], Fault | None]


class StoreProxy:
    """`decide` is asked about every request, in the order they come; None lets it pass."""

    def __init__(self, url: str, target: str):
        self.url = url
        self.target = target
        self.decide: Decide = lambda asked: None
        self.asked: list[Asked] = []
        self.num_faults = 0
        self._lock = threading.Lock()

    def judge(self, asked: Asked) -> Fault | None:
        with self._lock:
            self.asked.append(asked)
            fault = self.decide(asked)
            self.num_faults += fault is not None
            return fault

    def sometimes(self, share: float, *faults: Fault, seed: int = 0) -> None:
        """Fault a share of the requests, always the same ones for a seed, in one of these ways."""
        chance = random.Random(seed)
        self.decide = lambda asked: chance.choice(faults) if chance.random() < share else None


@contextmanager
def proxied(target: str) -> Iterator[StoreProxy]:
    """A proxy before the store at the URL `target`, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits for its header to be acknowledged

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.judge(Asked(self.command, self.path, self.headers.get("Authorization", "")))
            if fault is None:
                self.reply(*self.forward(body))
                return
            if fault.is_applied:
                self.forward(body)
            if fault.status is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
            self.reply(fault.status, {"Content-Type": "application/xml"}, text.encode())

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(urlsplit(target).netloc, timeout=60)
            try:
                # As they came: the Host header among them is signed.
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("expect", "connection"):
                        connection.putheader(name, value)
                connection.endheaders(body)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                connection.close()

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = StoreProxy(f"http://127.0.0.1:{server.server_address[1]}", target)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
