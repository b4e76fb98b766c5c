"""What is refused, how, and that nothing bad in a request is the server's fault."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from engine.async_engine import AsyncEngine
from engine.server.app import create_app
from engine.server.serving import BackgroundServer
from tests.server.conftest import MODEL, OPEN, make_engine

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


def refusal(server: BackgroundServer, path: str, body: bytes | dict[str, Any]) -> tuple[int, dict[str, Any]]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return answer.status_code, error


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": 1e-7}, "temperature", "bad_sampling"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"audio": {}}, "audio", "unknown_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
            "invalid_value",
        ),
        ({"n": 200}, "n", "above_max_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "above_max_value"),
        ({"stop": ""}, "stop", "bad_sampling"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias", "above_max_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "bad_sampling"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "bad_sampling"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", None),
        ({"min_tokens": 5}, "min_tokens", "bad_sampling"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"priority": -1}, "priority", None),
        ({"store": True}, "store", "invalid_value"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template", None),
        ({"chat_template_kwargs": {"enable_thinking": []}}, "chat_template_kwargs.enable_thinking", None),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", None),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "missing_required_parameter",
        ),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice", None),
        ({"guided_grammar": "x" * 70_000}, "guided_grammar", "string_above_max_length"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, "messages", "context_length_exceeded"),
    ],
)
def test_a_bad_field_is_named(server: BackgroundServer, fields: dict[str, Any], param: str, code: str | None):
    status, error = refusal(server, CHATS, CHAT | fields)
    assert (status, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )


def test_a_missing_field_is_named(server: BackgroundServer):
    status, error = refusal(server, CHATS, {"model": MODEL})
    assert (status, error["param"], error["code"]) == (400, "messages", "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
        b'{"tools": [{"type": "function", "function": {"name": "f", "parameters": {"\\ud800": 1}}}]}',
    ],
    ids=range(12),
)
def test_no_body_is_the_servers_fault(server: BackgroundServer, body: bytes):
    status, error = refusal(server, CHATS, body)
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_models_and_paths_that_are_not_there(server: BackgroundServer, client: Any):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert MODEL in str(refused.value)
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHATS, 405), ("PUT", "/health", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"]


def test_an_engine_with_too_much_to_do_says_when_to_come_back(loaded: Any):
    crowded = AsyncEngine(make_engine(loaded), max_waiting=1)
    with BackgroundServer(create_app({MODEL: crowded}, settings=OPEN), OPEN) as server:
        long = {**CHAT, "max_tokens": 1500, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", server.url + CHATS, json=long) as first:
            lines = first.iter_lines()
            next(lines)
            for body in (CHAT, {**CHAT, "stream": True}):
                answer = httpx.post(server.url + CHATS, json=body)
                assert answer.status_code == 429
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.json()["error"]["code"] == "overloaded"
            assert httpx.get(server.url + "/health").status_code == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=8)
        assert client.chat.completions.create(**CHAT).usage is not None  # its retries find room
        client.close()
        crowded.close()
        health = httpx.get(server.url + "/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert health.json()["models"] == {MODEL: False}
        answer = httpx.post(server.url + CHATS, json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_closed")


def test_a_request_that_takes_too_long(engine: AsyncEngine):
    settings = dataclasses.replace(OPEN, request_timeout_s=1.5)
    app = create_app({MODEL: engine}, settings=settings)
    long = {**CHAT, "max_tokens": 1900, "ignore_eos": True}
    streamed = _while_paused(engine, lambda: _post(app, {**long, "stream": True}))
    lines = [line for line in streamed.text.split("\n\n") if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert lines[-1] == "data: [DONE]"
    settings = dataclasses.replace(OPEN, request_timeout_s=0.05)
    answer = _post(create_app({MODEL: engine}, settings=settings), long)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")


def _while_paused(engine: AsyncEngine, call: Callable[[], httpx.Response]) -> httpx.Response:
    """The answer of a call whose request has begun when the engine stops to compute."""
    before = engine.stats().num_generated_tokens
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call)
        while engine.stats().num_generated_tokens < before + 4:
            time.sleep(0.005)
        engine.pause()
        try:
            return answer.result(timeout=30)
        finally:
            engine.resume()


def _post(app: Any, body: dict[str, Any]) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(CHATS, json=body)

    return asyncio.run(post())
