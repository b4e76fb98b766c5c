"""What is too large, too deep, too slow or not as declared is refused before an endpoint works on it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st

from engine.server.json_depth import JsonDepth
from engine.server.limits import MAX_JSON_DEPTH, LimitsMiddleware, install_limits
from engine.server.settings import ServerSettings
from tests.server.guarded_app import small_settings
from tests.server.uvicorn_thread import serving

values = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('[]{}"\\ab\u00e9\n'), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)


def plain_depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 1 + max(map(plain_depth, value), default=0)
    return 0


@given(values, st.booleans(), st.lists(st.integers(1, 7), min_size=1), st.integers(0, 5))
def test_depth_is_that_of_the_value_however_the_text_is_cut(
    value: Any, ascii_only: bool, sizes: list[int], max_depth: int
):
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    watch, is_exceeded, start = JsonDepth(max_depth), False, 0
    while start < len(text):
        size = sizes[start % len(sizes)]
        is_exceeded = watch.is_exceeded_by(text[start : start + size]) or is_exceeded
        start += size
    assert is_exceeded == (plain_depth(value) > max_depth)


def test_depth_of_a_long_text_is_told_without_recursion():
    assert JsonDepth(64).is_exceeded_by(b"[" * 3_000_000)
    assert not JsonDepth(64).is_exceeded_by(b"[]," * 1_000_000)
    assert not JsonDepth(64).is_exceeded_by(b'["' + b"[" * 1_000_000 + b'"]')


def limited_app(settings: ServerSettings, **options: Any) -> FastAPI:
    app = FastAPI()

    @app.post("/read")
    async def read(request: Request) -> dict[str, int]:
        return {"length": len(await request.body())}

    @app.post("/parse")
    async def parse(body: dict[str, Any]) -> dict[str, int]:
        return {"length": len(body)}

    @app.post("/files")
    async def files(request: Request) -> dict[str, int]:
        return {"length": len(await request.body())}

    @app.post("/sleep")
    async def sleep(request: Request) -> dict[str, str]:
        await asyncio.sleep(30)
        return {}

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.02)

        return StreamingResponse(endless())

    install_limits(app, settings, **options)
    return app


def post(app: FastAPI, path: str, content: Any = b"", **headers: str) -> httpx.Response:
    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.post(path, content=content, headers=named)

    return asyncio.run(call())


async def in_pieces(size: int, num: int) -> AsyncIterator[bytes]:
    for _ in range(num):
        yield b" " * size


def test_a_body_may_be_as_large_as_the_limit_and_no_larger():
    app = limited_app(small_settings(max_body_bytes=1000), max_body_bytes={"/files": 5000})
    for path, most in (("/read", 1000), ("/parse", 1000), ("/files", 5000)):
        largest = post(app, path, b"{}" + b" " * (most - 2), content_type="application/json")
        assert largest.status_code == 200, path
        for larger in (b"{}" + b" " * (most - 1), in_pieces(100, most // 100 + 1)):
            answer = post(app, path, larger, content_type="application/json")
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large"), path


@pytest.mark.parametrize("length", ["-1", "1e3", "+5", "0x10", "9" * 30, "5, 5"])
def test_a_content_length_is_a_number(length: str):
    app = limited_app(small_settings())
    assert post(app, "/read", b"hello", content_length=length).status_code in (400, 413)


@pytest.mark.parametrize("path", ["/read", "/parse"])
def test_json_nests_as_deep_as_the_limit_and_no_deeper(path: str):
    app = limited_app(small_settings(max_body_bytes=300_000))
    for depth, status in ((MAX_JSON_DEPTH, 200), (MAX_JSON_DEPTH + 1, 400), (100_000, 400)):
        content = b'{"a":' * (depth - 1) + b"[]" + b"}" * (depth - 1) if depth < 1000 else b"[" * depth
        answer = post(app, path, content, content_type="application/json")
        assert answer.status_code == status, depth
        if status == 400:
            assert answer.json()["error"]["code"] == "too_deep"


def test_files_in_a_form_may_hold_what_they_like():
    app = limited_app(small_settings())
    answer = post(app, "/read", b"[" * 1000, content_type="multipart/form-data; boundary=x")
    assert answer.json() == {"length": 1000}


def test_headers_and_encodings():
    app = limited_app(small_settings(max_header_bytes=1000))
    assert post(app, "/read", b"", x="y" * 2000).status_code == 431
    assert post(app, "/read?" + "q" * 2000, b"").status_code == 431
    assert post(app, "/read", b"x", content_encoding="gzip").status_code == 415
    assert post(app, "/read", b"x", content_encoding="identity").status_code == 200


def test_a_request_that_takes_too_long_is_a_504():
    app = limited_app(small_settings(request_timeout_s=0.1), grace_s=0.0)
    answer = post(app, "/sleep")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")


def test_an_answer_that_takes_too_long_is_broken_off_so_that_its_client_knows():
    app = limited_app(small_settings(request_timeout_s=0.2), grace_s=0.0)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        with client.stream("POST", "/stream") as answer:
            assert answer.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                answer.read()
        assert client.post("/read", content=b"12").json() == {"length": 2}


def test_an_apps_own_timeout_error_is_not_taken_for_ours():
    async def fails(_scope: Any, _receive: Any, _send: Any) -> None:
        raise TimeoutError("of the app")

    async def nothing(*_message: Any) -> Any:
        return {"type": "http.disconnect"}

    middleware = LimitsMiddleware(fails, settings=small_settings())
    scope = {"type": "http", "path": "/", "headers": [], "query_string": b""}
    with pytest.raises(TimeoutError, match="of the app"):
        asyncio.run(middleware(scope, nothing, nothing))


@pytest.mark.parametrize("declared", [True, False])
def test_a_client_that_still_sends_gets_to_read_that_its_body_is_too_large(declared: bool):
    """One that sends everything before it reads: were it cut off, its sending would fail and the answer be
    lost."""
    size = 12_000_000
    how = f"Content-Length: {size}" if declared else "Transfer-Encoding: chunked"
    with (
        serving(limited_app(small_settings(max_body_bytes=1000))) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection,
    ):
        connection.sendall(f"POST /read HTTP/1.1\r\nHost: x\r\n{how}\r\n\r\n".encode())
        connection.sendall(b"" if declared else f"{size:x}\r\n".encode())
        time.sleep(0.1)
        for _ in range(size // 100_000):
            connection.sendall(b"x" * 100_000)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
