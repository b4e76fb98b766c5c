"""Clients that keep the server waiting are cut off, and until then keep nobody else waiting. Raw sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import Response

from engine.server.connections import uvicorn_options
from engine.server.keys import KeyRing
from engine.server.limits import install_limits
from engine.server.settings import ServerSettings
from tests.server.guarded_app import guarded_app, small_settings
from tests.server.uvicorn_thread import serving

KEY = "user-key"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
LEFT_OUT_KEY = HEAD + b"Content-Length: 1000\r\n\r\n"
WITH_KEY = HEAD + b"X-API-Key: user-key\r\nContent-Length: 1000\r\n\r\n"


@contextmanager
def limited(settings: ServerSettings, app: FastAPI | None = None) -> Iterator[str]:
    if app is None:
        app = guarded_app(KeyRing(api_keys=[KEY]), settings)
        install_limits(app, settings)
    with serving(app, **uvicorn_options(settings)) as url:
        yield url


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """With all limits of half a second."""
    with limited(small_settings()) as url:
        yield url


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes; a reset counts as closing."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def seconds_until_closed(connection: socket.socket, drip: bytes = b"") -> float:
    """How long the server bears a client that sends `drip` every 50 ms."""
    began = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - began < 10:
        try:
            if drip:
                connection.sendall(drip)
            if not connection.recv(65536):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("begun", "says"),
    [
        (b"", b" 408 "),
        (b"GET / HTT", b" 408 "),
        (HEAD, b" 408 "),
        (WITH_KEY, b" 408 "),
        (WITH_KEY + b"half", b" 408 "),
        (LEFT_OUT_KEY, b" 401 "),
    ],
    ids=["nothing", "half a line", "half the headers", "no body", "half a body", "refused, no body"],
)
def test_who_stops_sending_is_cut_off(server: str, begun: bytes, says: bytes):
    with connect(server) as connection:
        connection.sendall(begun)
        began = time.monotonic()
        assert says in answer_of(connection).partition(b"\r\n")[0]
        assert 0.3 < time.monotonic() - began < 3.0


@pytest.mark.parametrize(
    ("begun", "drip"),
    [(HEAD, b"X-A: b\r\n"), (b"GET /", b"a"), (LEFT_OUT_KEY, b"x"), (WITH_KEY, b"x")],
    ids=["headers", "a path", "a body that was refused", "a body"],
)
def test_sending_a_little_now_and_then_wins_no_time(server: str, begun: bytes, drip: bytes):
    with connect(server) as connection:
        connection.sendall(begun)
        assert 0.3 < seconds_until_closed(connection, drip) < 3.0


def test_the_next_request_of_a_connection_is_timed_too(server: str):
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(server) as connection:
        for _ in range(3):
            connection.sendall(request)
            assert b"200 OK" in connection.recv(65536)
            time.sleep(
                0.3
            )  # idle for less than uvicorn keeps a connection, in all longer than headers may take
        connection.sendall(request[:10])
        assert 0.3 < seconds_until_closed(connection, b"x") < 3.0


def test_who_takes_no_answer_is_cut_off():
    app = FastAPI()
    size = 50_000_000

    @app.get("/")
    def large() -> Response:
        return Response(b"x" * size)

    with limited(small_settings(), app) as url, connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(100)
        time.sleep(1.5)
        assert len(answer_of(connection)) < size
    with limited(small_settings(), app) as url:
        assert len(httpx.get(url).content) == size


def test_a_hundred_slow_clients_slow_nobody():
    settings = small_settings(header_timeout_s=20.0, body_timeout_s=20.0)
    with limited(settings) as url, ExitStack() as stack:
        slow = [stack.enter_context(connect(url)) for _ in range(100)]
        for number, connection in enumerate(slow):
            connection.sendall((HEAD, WITH_KEY, LEFT_OUT_KEY, b"G")[number % 4])
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                for number, connection in enumerate(slow):
                    connection.sendall(b"X-A: b\r\n" if number % 4 == 0 else b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with httpx.Client(base_url=url, headers={"x-api-key": KEY}) as client:
                took = []
                for _ in range(50):
                    began = time.monotonic()
                    answer = client.post("/v1/chat/completions", content=b"hello")
                    took.append(time.monotonic() - began)
                    assert answer.json() == {"length": 5}
        finally:
            stop.set()
            dripping.join()
        assert sorted(took)[45] < 0.5, took


def test_where_all_connections_are_taken_the_longest_waiting_gives_way():
    settings = small_settings(max_connections=10, header_timeout_s=20.0)
    with limited(settings) as url, ExitStack() as stack:
        slow = [stack.enter_context(connect(url)) for _ in range(10)]
        for connection in slow:
            connection.sendall(HEAD)
            time.sleep(0.02)
        for turn in range(3):
            assert httpx.get(f"{url}/health").status_code == 200, turn
        slow[0].settimeout(5)
        assert answer_of(slow[0]) == b""
        slow[9].settimeout(0.1)
        with pytest.raises(TimeoutError):
            slow[9].recv(1)


def test_where_all_connections_are_at_work_one_more_is_refused():
    go_on = threading.Event()
    app = FastAPI()

    @app.get("/wait")
    def wait() -> str:
        go_on.wait(10)
        return "done"

    with limited(small_settings(max_connections=2, request_timeout_s=20.0), app) as url, ExitStack() as stack:
        busy = [stack.enter_context(connect(url)) for _ in range(2)]
        for connection in busy:
            connection.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(0.3)
        with connect(url) as connection:
            assert answer_of(connection).startswith(b"HTTP/1.1 503 ")
        go_on.set()
        assert all(b'"done"' in answer_of(connection) for connection in busy)


def test_headers_that_are_too_large_or_none_are_refused_in_the_same_format(server: str):
    for sent, says in ((HEAD + b"X-A: " + b"a" * 9000, b" 431 "), (b"nonsense\r\n\r\n", b" 400 ")):
        with connect(server) as connection:
            connection.sendall(sent)
            head, _, body = answer_of(connection).partition(b"\r\n\r\n")
            assert says in head
            assert b'{"error":' in body
