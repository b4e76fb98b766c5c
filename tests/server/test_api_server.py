"""eSurge's server as its documentation has it: keys, several models, metrics; parsers of reasoning."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from engine.async_engine import AsyncEngine
from engine.errors import ConfigError
from engine.server import ServerSettings, create_app, eSurgeApiServer
from engine.server.serving import BackgroundServer, bound_socket
from tests.server.conftest import MODEL, OPEN, complete

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def guarded(engine: AsyncEngine) -> Iterator[tuple[eSurgeApiServer, str]]:
    """A server that wants keys; its engine goes on after it."""
    server = eSurgeApiServer(engine, require_api_key=True, api_keys={"demo-key": {"label": "UI"}})
    with _Kept(server.app, engine) as url:
        yield server, url


class _Kept(BackgroundServer):
    """A server whose end leaves the engine open, which other tests share."""

    def __init__(self, app: Any, engine: AsyncEngine):
        super().__init__(app, OPEN)
        self._engine = engine

    def __enter__(self) -> str:  # type: ignore[override]
        super().__enter__()
        self._close, self._engine.close = self._engine.close, lambda *_: None  # type: ignore[method-assign]
        return self.url

    def stop(self) -> None:
        super().stop()
        self._engine.close = self._close  # type: ignore[method-assign]


def test_keys_as_documented(guarded: tuple[eSurgeApiServer, str]):
    server, url = guarded
    made = server.generate_api_key(label="notebook")
    for key in ("demo-key", made):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            answer = client.chat.completions.create(model="default", **CHAT)
            assert answer.usage is not None
            stream = client.chat.completions.create(model="default", **CHAT, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == answer.choices[0].message.content
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
    assert httpx.get(f"{url}/v1/models", headers={"X-API-Key": made}).status_code == 200
    assert httpx.get(f"{url}/v1/models", params={"api_key": made}).status_code == 401  # it has to be allowed
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/openapi.json").status_code == 401


def test_what_keys_use_is_counted_whole_streamed_and_given_up(guarded: tuple[eSurgeApiServer, str]):
    server, url = guarded
    key = server.generate_api_key(label="counted")
    key_id = next(each.id for each in server.keys.keys() if each.label == "counted")  # noqa: SIM118
    headers = {"Authorization": f"Bearer {key}"}
    whole = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers).json()["usage"]
    httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers)
    used = server.keys.usage(key_id)
    assert used["prompt_tokens"] == 2 * whole["prompt_tokens"]
    assert used["completion_tokens"] == 2 * whole["completion_tokens"] == 8
    body = {**CHAT, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        for _ in range(4):
            next(lines)
    for _ in range(100):
        if server.keys.usage(key_id)["completion_tokens"] > 8:
            break
        asyncio.run(asyncio.sleep(0.02))
    assert 8 < server.keys.usage(key_id)["completion_tokens"] < 1900


def test_metrics_are_prometheus_text_for_who_may_see_them(guarded: tuple[eSurgeApiServer, str]):
    server, url = guarded
    monitor = {"X-API-Key": server.generate_api_key(label="prometheus", role="monitor")}
    httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers={"X-API-Key": "demo-key"})
    answer = httpx.get(f"{url}/metrics", headers=monitor)
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [line for line in answer.text.splitlines() if not line.startswith("#")]
    assert any(line.startswith("tidemill_requests_total{") for line in samples)
    assert any(
        line.startswith("tidemill_api_key_prompt_tokens_total{") and 'label="UI"' in line for line in samples
    )
    assert "demo-key" not in answer.text
    assert httpx.get(f"{url}/metrics").status_code == 401
    page = httpx.get(f"{url}/dashboard")
    assert (page.status_code, "<script" in page.text) == (200, True)
    assert httpx.get(f"{url}/dashboard/data").status_code == 401


def test_a_response_is_stored_for_its_key_alone(guarded: tuple[eSurgeApiServer, str]):
    server, url = guarded
    with openai.OpenAI(base_url=f"{url}/v1", api_key="demo-key", max_retries=0) as client:
        made = client.responses.create(model="default", input="x", max_output_tokens=2)
        assert client.responses.retrieve(made.id).id == made.id
    other = {"X-API-Key": server.generate_api_key(label="other")}
    assert httpx.get(f"{url}/v1/responses/{made.id}", headers=other).status_code == 404


def test_prompts_of_different_keys_share_no_cached_pages(guarded: tuple[eSurgeApiServer, str]):
    server, url = guarded
    chat = {**CHAT, "messages": [{"role": "user", "content": "Nobody else is to know of this. " * 5}]}
    cached = []
    for key in (server.generate_api_key(), server.generate_api_key()):
        for _ in range(2):
            answer = httpx.post(f"{url}/v1/chat/completions", json=chat, headers={"X-API-Key": key})
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[2] == 0
    assert min(cached[1], cached[3]) > 0


def test_several_models_answer_by_their_names(engine: AsyncEngine):
    app = create_app({"one": engine, "two/b": engine}, settings=OPEN)
    assert [model["id"] for model in _get(app, "/v1/models").json()["data"]] == ["one", "two/b"]
    assert _get(app, "/v1/models/two/b").json()["id"] == "two/b"
    answer = _post(app, {**CHAT, "model": "two/b"})
    assert (answer.status_code, answer.json()["model"]) == (200, "two/b")
    for name in ("default", "three"):
        refused = _post(app, {**CHAT, "model": name})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert "one, two/b" in refused.json()["error"]["message"]


def test_reasoning_is_told_apart(engine: AsyncEngine):
    settings = dataclasses.replace(OPEN, reasoning_parser="deepseek_r1")
    app = create_app({MODEL: engine}, settings=settings)
    body = {**CHAT, "max_tokens": 100, "guided_choice": ["<think>It is odd.</think>Yes."]}
    message = _post(app, body).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes.", "It is odd.")
    streamed = _post(app, {**body, "stream": True}).text
    assert '"reasoning_content":"' in streamed
    asked = {"input": "Hello", "max_output_tokens": 100, "guided_choice": body["guided_choice"]}
    response = _post(app, asked, "/v1/responses").json()
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert response["output"][0]["content"][0]["text"] == "It is odd."
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_settings_that_do_not_fit_are_refused(engine: AsyncEngine):
    with pytest.raises(ConfigError, match=r"max_tokns does not exist.*'max_tokens'"):
        eSurgeApiServer(engine, max_tokns=3)
    with pytest.raises(ConfigError, match="max_n=0"):
        ServerSettings(max_n=0)
    with pytest.raises(ConfigError, match="tool_parser='x'"):
        create_app({MODEL: engine}, settings=dataclasses.replace(OPEN, tool_parser="x"))
    with pytest.raises(ConfigError, match="at least one model"):
        create_app({}, settings=OPEN)


def test_an_open_server_stays_on_the_loopback():
    with pytest.raises(ConfigError, match="no key is required"):
        bound_socket("0.0.0.0", 0, OPEN)
    bound_socket("localhost", 0, OPEN).close()
    bound_socket("0.0.0.0", 0, ServerSettings()).close()
    with bound_socket("127.0.0.1", 0, OPEN) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1"):
            bound_socket("127.0.0.1", taken.getsockname()[1], OPEN)


def test_a_limit_of_tokens_holds_for_every_request(engine: AsyncEngine):
    app = create_app({MODEL: engine}, settings=dataclasses.replace(OPEN, max_tokens=6))
    unsaid = {key: value for key, value in CHAT.items() if key != "max_tokens"}
    body = {**unsaid, "ignore_eos": True}
    assert _post(app, body).json()["usage"]["completion_tokens"] == 6
    assert _post(app, {**body, "max_tokens": 7}).json()["error"]["param"] == "max_tokens"


def test_a_prompt_that_is_cut_off_by_the_models_length_ends_by_length(engine: AsyncEngine):
    prompt = [50] * 2040
    answer = _post(
        create_app({MODEL: engine}, settings=OPEN),
        {"prompt": prompt, "max_tokens": 100, "ignore_eos": True},
        "/v1/completions",
    ).json()
    expected = complete(engine, prompt, max_tokens=100, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == len(expected.outputs[0].token_ids) == 8
    assert answer["choices"][0]["finish_reason"] == "length"


def _post(app: Any, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    return asyncio.run(_call(app, "POST", path, json=body))


def _get(app: Any, path: str) -> httpx.Response:
    return asyncio.run(_call(app, "GET", path))


async def _call(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **options)
