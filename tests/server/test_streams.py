"""Streams to the byte, and clients that go away."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from engine.async_engine import AsyncEngine
from engine.server.app import create_app
from engine.server.serving import BackgroundServer
from tests.server.conftest import MODEL, OPEN, assert_idle, make_engine

LONG: dict[str, Any] = {"model": MODEL, "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
CALLS = [
    ("/v1/chat/completions", {**LONG, "messages": [{"role": "user", "content": "Hi"}]}),
    ("/v1/completions", {**LONG, "prompt": ["Hi", "Ho"]}),
    ("/v1/responses", {"model": MODEL, "max_output_tokens": 1900, "ignore_eos": True, "input": "Hi"}),
]


def test_a_stream_is_events_to_the_byte(server: BackgroundServer):
    body = {**CALLS[0][1], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(server.url + CALLS[0][0], json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert "content-length" not in answer.headers
    assert answer.content.endswith(b"\n\ndata: [DONE]\n\n")
    events = answer.content.removesuffix(b"\n\n").split(b"\n\n")
    values = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert all(event.startswith(b"data: {") for event in events[:-1])
    head = {key: values[0][key] for key in ("id", "object", "created", "model")}
    assert values[0] == head | {
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        "usage": None,
    }
    assert values[-2] == head | {
        "choices": [
            {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ],
        "usage": None,
    }
    assert values[-1] == head | {
        "choices": [],
        "usage": {
            "prompt_tokens": values[-1]["usage"]["prompt_tokens"],
            "completion_tokens": 3,
            "total_tokens": values[-1]["usage"]["prompt_tokens"] + 3,
            "prompt_tokens_details": values[-1]["usage"]["prompt_tokens_details"],
        },
    }


def test_an_answer_has_the_fields_of_openai_and_no_others(server: BackgroundServer):
    answer = httpx.post(server.url + CALLS[0][0], json={**CALLS[0][1], "max_tokens": 3}).json()
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage"]
    (choice,) = answer["choices"]
    assert list(choice) == ["index", "message", "logprobs", "finish_reason", "stop_reason"]
    assert list(choice["message"]) == ["role", "content", "refusal"]


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "body"), CALLS, ids=["chat", "completions", "responses"])
def test_a_client_that_goes_away_frees_its_pages(
    server: BackgroundServer, engine: AsyncEngine, path: str, body: dict[str, Any], streams: bool
):
    before = engine.stats().num_generated_tokens
    content = json.dumps({**body, "stream": streams}).encode()
    with _connection(server) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        _wait_for(lambda: engine.stats().num_generated_tokens > before + 20)
        if streams:
            assert b"text/event-stream" in connection.recv(65_536)
    _wait_for(lambda: engine.num_unfinished == 0)
    assert_idle(engine)
    num_drawn = engine.stats().num_generated_tokens - before
    assert num_drawn < 1900, "it went on to its end"


def test_a_client_that_goes_away_while_it_waits_is_forgotten(server: BackgroundServer, engine: AsyncEngine):
    path, body = CALLS[0]
    content = json.dumps({**body, "stream": True}).encode()
    engine.pause()
    try:
        with _connection(server) as connection:
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            _wait_for(lambda: engine.num_unfinished == 1)
        _wait_for(lambda: engine.num_unfinished == 0)
    finally:
        engine.resume()


@pytest.mark.parametrize(("num_tokens", "is_cut_off"), [(100, False), (1900, True)])
def test_an_ending_server_lets_calls_end_and_aborts_the_long_ones(
    loaded: Any, num_tokens: int, is_cut_off: bool
):
    engine = AsyncEngine(make_engine(loaded))
    settings = dataclasses.replace(OPEN, drain_seconds=0.3 if is_cut_off else 20)
    server = BackgroundServer(create_app({MODEL: engine}, settings=settings), settings)
    with server:
        body = {**CALLS[1][1], "max_tokens": num_tokens, "stream": True}
        with httpx.stream("POST", server.url + CALLS[1][0], json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            ending = threading.Thread(target=server.stop)
            ending.start()
            events = [line for line in lines if line]
            ending.join()
        assert events[-1] == "data: [DONE]"
        last = json.loads(events[-2].removeprefix("data: "))
        if is_cut_off:
            assert last["error"]["code"] == "engine_closed"
        else:
            assert last["choices"][0]["finish_reason"] == "length"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    stats = engine.engine.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)


def _connection(server: BackgroundServer) -> socket.socket:
    where = urlsplit(server.url)
    return socket.create_connection((where.hostname or "", where.port or 0), timeout=10)


def _wait_for(is_so: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
