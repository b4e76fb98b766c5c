"""The real server behind its guards, alone and behind a router: closed without a key, counted with one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from engine.async_engine import AsyncEngine
from engine.server.app import create_app
from engine.server.connections import uvicorn_options
from engine.server.keys import KeyRing
from engine.server.router.app import create_router_app
from engine.server.router.settings import RouterSettings, UpstreamSettings
from engine.server.serving import BackgroundServer
from engine.server.settings import ServerSettings
from tests.server.conftest import MODEL, text_of
from tests.server.uvicorn_thread import serving, until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say something."}]


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, **options)

    return asyncio.run(call())


def guarded(engine: AsyncEngine, keys: KeyRing) -> FastAPI:
    return create_app({MODEL: engine}, settings=ServerSettings(), keys=keys)


def test_every_documented_path_of_the_server_is_closed(engine: AsyncEngine):
    app = guarded(engine, KeyRing(api_keys={"a-key": {}, "an-admin": {"role": "admin"}}))
    document = ask(app, "GET", "/openapi.json", headers={"x-api-key": "a-key"}).json()
    calls = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    assert {("POST", CHAT), ("POST", "/v1/admin/keys"), ("GET", "/metrics"), ("GET", "/health")} <= set(calls)
    for method, path in calls:
        status = ask(app, method, re.sub(r"[{}]", "", path)).status_code
        assert status == (200 if path == "/health" else 401), (method, path)
    for method, path in calls:
        if path.startswith("/v1/admin"):
            headers = {"x-api-key": "a-key"}
            assert ask(app, method, re.sub(r"[{}]", "", path), headers=headers).status_code == 403


def test_health_without_a_key_says_whether_and_with_one_how(engine: AsyncEngine):
    app = guarded(engine, KeyRing(api_keys=["a-key"]))
    assert ask(app, "GET", "/health").json() == {"status": "ok"}
    known = ask(app, "GET", "/health", headers={"x-api-key": "a-key"}).json()
    assert known == {"status": "ok", "models": {MODEL: True}, "num_running": 0, "num_waiting": 0}


def test_what_a_request_took_is_its_keys(engine: AsyncEngine):
    keys = KeyRing(api_keys={"a-key": {"tokens_per_lifetime": 1}})
    app = guarded(engine, keys)
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
    answer = ask(app, "POST", CHAT, json=body, headers={"authorization": "Bearer a-key"}).json()
    used = keys.usage(keys.keys()[0].id)
    assert used["prompt_tokens"] == answer["usage"]["prompt_tokens"] > 0
    assert used["completion_tokens"] == answer["usage"]["completion_tokens"] == 4
    refused = ask(app, "POST", CHAT, json=body, headers={"authorization": "Bearer a-key"})
    assert refused.json()["error"]["code"] == "insufficient_quota"


@pytest.fixture
def routed(engine: AsyncEngine, server: BackgroundServer) -> Iterator[tuple[openai.OpenAI, KeyRing]]:
    """A client of a router over the server and over the same engine in this process, and the router's
    keys."""
    here = guarded(engine, KeyRing(api_keys=["of-the-upstream"]))

    async def without_lifespan(scope: Any, receive: Any, send: Any) -> None:
        await here(scope, receive, send)  # as an app that is not FastAPI's: the engine outlives this test

    upstreams = (
        UpstreamSettings(name="there", url=server.url),
        UpstreamSettings(name="here", api_key="of-the-upstream"),
    )
    keys = KeyRing(api_keys=["a-key"])
    settings = ServerSettings(drain_seconds=1)
    router = create_router_app(
        RouterSettings(upstreams=upstreams), server=settings, keys=keys, local={"here": without_lifespan}
    )
    with (
        serving(router, **uvicorn_options(settings)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="a-key", max_retries=0) as client,
    ):
        yield client, keys


def test_through_a_router_answers_are_what_the_engine_makes(
    engine: AsyncEngine, routed: tuple[openai.OpenAI, KeyRing]
):
    client, keys = routed
    assert [model.id for model in client.models.list()] == [MODEL]
    for number in range(4):  # to either upstream
        prompt = f"Number {number} of a few prompts"
        expected = text_of(engine, prompt, max_tokens=6, temperature=0.0)
        options: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0.0}
        assert client.completions.create(**options).choices[0].text == expected
        events = list(client.completions.create(**options, stream=True))
        assert "".join(event.choices[0].text for event in events) == expected
    key_id = keys.keys()[0].id
    until(lambda: keys.usage(key_id)["completion_tokens"] == 8 * 6)
    assert keys.usage(key_id)["requests"] == 1 + 8
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="none", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=MODEL, prompt="x", max_tokens=-1)


def test_a_stream_that_its_client_leaves_ends_in_the_engine_too(
    engine: AsyncEngine, routed: tuple[openai.OpenAI, KeyRing]
):
    client, _ = routed
    for number in range(4):
        stream = client.completions.create(
            model=MODEL, prompt=f"prompt {number}", max_tokens=1500, stream=True
        )
        next(iter(stream))
        engine.pause()  # so that it cannot end by itself
        try:
            stream.close()
            until(lambda: engine.num_unfinished == 0)
        finally:
            engine.resume()
