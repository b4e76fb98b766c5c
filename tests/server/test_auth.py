"""Every route is closed without a key, however its path is spelled, and a key is seen by nothing behind the
door."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.server.auth import AuthMiddleware, role_needed
from engine.server.keys import KeyRing
from tests.server.guarded_app import guarded_app, small_settings
from tests.server.uvicorn_thread import serving

USER, ADMIN, MONITOR = "user-key-5d1f", "admin-key-77aa", "monitor-key-90c3"


def make_ring(**limits: int) -> KeyRing:
    keys = {USER: {"label": "u", **limits}, ADMIN: {"role": "admin"}, MONITOR: {"role": "monitor"}}
    return KeyRing(api_keys=keys)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def ask_many(app: FastAPI, requests: list[tuple[str, str, dict[str, str]]]) -> list[httpx.Response]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return [await client.request(method, path, headers=headers) for method, path, headers in requests]


def ask(app: FastAPI, method: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return asyncio.run(ask_many(app, [(method, path, headers or {})]))[0]


@pytest.fixture
def app() -> FastAPI:
    return guarded_app(make_ring(), small_settings())


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer in OpenAI's format."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def documented_paths(app: FastAPI) -> list[str]:
    with warnings.catch_warnings(action="ignore"):  # of one function that has several methods
        return list(app.openapi()["paths"])


def test_every_route_but_health_wants_a_key(app: FastAPI):
    paths = [*documented_paths(app), "/", "/nothing", "/mounted/hidden", "/openapi.json", "/docs"]
    assert {"/v1/models", "/v1/admin/keys/{key_id}/rotate", "/metrics"} < set(paths)
    for path in paths:
        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE"):
            answer = ask(app, method, path.replace("{", "").replace("}", ""))
            is_open = path == "/health" and method in ("GET", "HEAD")
            assert (answer.status_code == 401) != is_open, (method, path, answer.status_code)
    assert ask(app, "GET", "/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "path",
    [
        "//health",
        "/health/",
        "/health.",
        "/Health",
        "/health%2e",
        "/%2fhealth",
        "/v1/../health",
        "/health/../v1/models",
        "/health;x=/v1/models",
        "/health%00",
        "//v1/models",
        "/v1//models",
        "/%76%31/models",
        "/v1/models/",
        "/v1/%2e%2e/v1/models",
        "/mounted/hidden",
        "/mounted//hidden",
        "/mounted/../health/../v1/models",
    ],
)
def test_no_spelling_of_a_path_opens_a_route(app: FastAPI, path: str):
    with serving(app) as url:
        host, port = url.removeprefix("http://").split(":")
        answer = asyncio.run(raw_get(host, int(port), path))
    assert b" 401 " in answer.splitlines()[0]
    assert b"hidden" not in answer


async def raw_get(host: str, port: int, path: str, more: str = "") -> bytes:
    """The answer to a path exactly as spelled, which a client's library would mend."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{more}Connection: close\r\n\r\n".encode("latin-1"))
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


def test_neither_the_host_nor_forwarding_headers_decide(app: FastAPI):
    for name in ("host", "x-forwarded-host", "x-original-url", "x-rewrite-url", "x-forwarded-prefix"):
        for value in ("/health", "localhost/health", "127.0.0.1"):
            assert ask(app, "GET", "/v1/models", {name: value}).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/v1/admin/keys",
        "//v1/admin/keys",
        "/v1//admin",
        "/v1/%61dmin/keys",
        "/V1/Admin/keys",
        "/v1/x/../admin/keys",
        "/v1/./admin./keys",
        "/v1\\admin",
        "/v1/admin;a=b/keys",
        "/v1/%2561dmin",
        "/api/v1/admin/keys",
    ],
)
def test_what_might_be_read_as_an_admin_path_needs_an_admin(path: str):
    assert role_needed(path) == "admin"


def test_roles(app: FastAPI):
    expected = {
        "/v1/models": {USER: 200, ADMIN: 200, MONITOR: 403},
        "/metrics": {USER: 403, ADMIN: 200, MONITOR: 200},
        "/v1/admin/keys": {USER: 403, ADMIN: 200, MONITOR: 403},
        "/health": {USER: 200, ADMIN: 200, MONITOR: 200},
    }
    for path, by_key in expected.items():
        for key, status in by_key.items():
            answer = ask(app, "GET", path, bearer(key))
            assert answer.status_code == status, (path, key)
            if status == 403:
                assert error_of(answer)["code"] == "insufficient_permissions"


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        (bearer(USER), "/v1/models", 200),
        ({"authorization": f"bearer   {USER} "}, "/v1/models", 200),
        ({"x-api-key": USER}, "/v1/models", 200),
        ({"x-api-key": USER, **bearer(USER)}, "/v1/models", 200),
        ({"x-api-key": ADMIN, **bearer(USER)}, "/v1/models", 401),
        ({"authorization": USER}, "/v1/models", 401),
        ({"authorization": f"Basic {USER}"}, "/v1/models", 401),
        ({"authorization": "Bearer "}, "/v1/models", 401),
        (bearer(USER[:-1]), "/v1/models", 401),
        (bearer("x" * 3000), "/v1/models", 401),
        ({}, f"/v1/models?api_key={USER}", 401),
        ({}, f"/v1/models?x=1&API_KEY={USER}", 401),
    ],
)
def test_where_a_key_is_looked_for(app: FastAPI, headers: dict[str, str], path: str, status: int):
    answer = ask(app, "GET", path, headers)
    assert answer.status_code == status
    if status == 401:
        error = error_of(answer)
        assert error["code"] in ("invalid_api_key", "missing_api_key")
        assert USER not in answer.text
        assert answer.headers["www-authenticate"] == "Bearer"


def test_the_query_counts_only_where_it_is_switched_on():
    app = guarded_app(make_ring(), small_settings(api_key_in_query=True))
    answer = ask(app, "GET", f"/v1/models?a=1&api_key={USER}&b=2")
    assert answer.status_code == 200
    assert answer.json()["query"] == "a=1&b=2"


def test_endpoints_see_whose_key_it_is_and_never_the_key(app: FastAPI):
    answer = ask(app, "GET", "/v1/models", bearer(USER))
    assert answer.json()["key"].startswith("key-")
    assert USER not in answer.text
    assert "authorization" not in answer.json()["headers"]


def test_without_require_api_key_all_may_call_and_known_keys_count():
    ring = make_ring(requests_per_minute=1)
    app = guarded_app(ring, small_settings(require_api_key=False))
    assert ask(app, "GET", "/v1/models").json()["key"] is None
    assert ask(app, "GET", "/v1/models", bearer("anything")).json()["key"] is None
    assert ask(app, "GET", "/metrics").status_code == 200
    assert ask(app, "GET", "/v1/models", bearer(USER)).json()["key"] == ring.keys()[0].id
    assert ask(app, "GET", "/v1/models", bearer(USER)).status_code == 429
    assert ask(app, "GET", "/v1/admin/keys").status_code == 401
    assert ask(app, "GET", "/v1/admin/keys", bearer(USER)).status_code == 403
    ring.suspend(ring.keys()[0].id)
    assert ask(app, "GET", "/v1/models", bearer(USER)).status_code == 403


def test_withdrawn_keys_are_told_so():
    ring = make_ring()
    app = guarded_app(ring, small_settings())
    key_id = ring.keys()[0].id
    ring.suspend(key_id)
    answer = ask(app, "GET", "/v1/models", bearer(USER))
    assert (answer.status_code, error_of(answer)["code"]) == (403, "key_suspended")
    ring.revoke(key_id)
    answer = ask(app, "GET", "/v1/models", bearer(USER))
    assert (answer.status_code, error_of(answer)["code"]) == (401, "key_revoked")
    secret = ring.generate_api_key(expires_in_s=1e-6)
    answer = ask(app, "GET", "/v1/models", bearer(secret))
    assert (answer.status_code, error_of(answer)["code"]) == (401, "key_expired")


def test_what_is_left_of_a_limit_is_in_the_headers_and_its_end_in_a_429():
    app = guarded_app(make_ring(requests_per_minute=2, tokens_per_day=100), small_settings())
    first, second, third = asyncio.run(ask_many(app, [("GET", "/v1/models", bearer(USER))] * 3))
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "100"
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.status_code == 429
    error = error_of(third)
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(third.headers["retry-after"]) <= 61
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.headers["x-ratelimit-reset-requests"].endswith("s")


def test_a_quota_that_is_used_up_is_not_to_be_retried():
    ring = make_ring(tokens_per_lifetime=10)
    app = guarded_app(ring, small_settings())
    ring.record_usage(ring.keys()[0].id, 9, 1)
    answer = ask(app, "GET", "/v1/models", bearer(USER))
    assert (answer.status_code, error_of(answer)["code"]) == (429, "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers


class Paused:
    """An ASGI app whose answers wait until they may go on, and a client of it behind the door."""

    def __init__(self, ring: KeyRing, **settings: Any):
        self.at_work, self.go_on = asyncio.Event(), asyncio.Event()
        door = AuthMiddleware(self, keys=ring, settings=small_settings(**settings))
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://server")

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        self.at_work.set()
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def begin(self, headers: dict[str, str]) -> asyncio.Task[httpx.Response]:
        """A request that is at work."""
        self.at_work.clear()
        task = asyncio.create_task(self.client.get("/v1/models", headers=headers))
        await asyncio.wait({task, asyncio.create_task(self.at_work.wait())}, return_when="FIRST_COMPLETED")
        assert not task.done(), task.result()
        return task


@pytest.mark.parametrize(
    ("of_key", "settings", "headers"),
    [
        ({"max_concurrent": 1}, {}, bearer(USER)),
        ({}, {"max_concurrent_per_key": 1}, bearer(USER)),
        ({}, {"max_concurrent_per_key": 1, "require_api_key": False}, {}),
    ],
    ids=["a key's own limit", "the server's for a key", "the server's for an address"],
)
def test_as_many_run_at_once_as_may_and_the_place_is_given_back(
    of_key: dict[str, int], settings: dict[str, Any], headers: dict[str, str]
):
    async def run() -> None:
        ring = make_ring(**of_key)
        app = Paused(ring, **settings)
        async with asyncio.timeout(20), app.client:
            first = await app.begin(headers)
            refused = await app.client.get("/v1/models", headers=headers)
            assert refused.status_code == 429
            assert error_of(refused)["code"] == "concurrency_limit_exceeded"
            assert refused.headers["retry-after"] == "1"
            app.go_on.set()
            assert (await first).status_code == 200
            app.go_on.clear()
            cancelled = await app.begin(headers)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            app.go_on.set()
            assert (await app.client.get("/v1/models", headers=headers)).status_code == 200
        assert ring.usage(ring.keys()[0].id)["in_flight"] == 0

    asyncio.run(run())


def test_a_websocket_without_a_key_is_closed_before_it_opens():
    sent: list[Any] = []
    reached: list[Any] = []

    async def inner(scope: Any, _receive: Any, _send: Any) -> None:
        reached.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    middleware = AuthMiddleware(inner, keys=make_ring(), settings=small_settings())
    scope: dict[str, Any] = {"type": "websocket", "path": "/health", "headers": [], "query_string": b""}
    asyncio.run(middleware(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "missing_api_key"}]
    assert not reached
    scope["headers"] = [(b"Authorization", f"Bearer {USER}".encode())]
    asyncio.run(middleware(scope, receive, send))
    assert len(reached) == 1


def test_an_app_under_a_prefix_is_guarded_like_one_without():
    outer = FastAPI()
    outer.mount("/api", guarded_app(make_ring(), small_settings()))
    assert ask(outer, "GET", "/api/health").status_code == 200
    assert ask(outer, "GET", "/api/v1/models").status_code == 401
    assert ask(outer, "GET", "/api/v1/models", bearer(USER)).status_code == 200
    assert ask(outer, "GET", "/api/v1/admin/keys", bearer(USER)).status_code == 403


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def test_keys_are_in_no_log_no_metric_and_no_error(all_logs: pytest.LogCaptureFixture):
    ring = make_ring(requests_per_minute=3)
    made = ring.generate_api_key(label="made")
    wrong = "sk-tm-" + "wrong" * 8
    seen: list[str] = []
    app = guarded_app(ring, small_settings(api_key_in_query=True))
    closing = {"connection": "close"}  # a server ends the connection of an endpoint that fails
    with serving(app, log_level="debug") as url, httpx.Client(base_url=url, headers=closing) as client:
        for key in (USER, ADMIN, MONITOR, made, wrong):
            for path in (
                "/v1/models",
                "/v1/fails",
                "/nothing",
                "/v1/admin/keys",
                "/v1/admin/audit",
                "/metrics",
            ):
                seen.append(client.get(path, headers=bearer(key)).text)
                seen.append(client.get(f"{path}?api_key={key}").text)
                seen.append(client.post(path, headers={"x-api-key": key}, json={}).text)
    # What the test's own client logs is not the server's.
    records = [
        record for record in all_logs.records if record.name.split(".")[0] not in ("httpx", "httpcore")
    ]
    logged = "\n".join(logging.Formatter().format(record) for record in records)
    assert "failed on" in logged  # the traceback of the endpoint that fails is there
    assert "GET /v1/models" in logged  # and the access log
    for key in (USER, ADMIN, MONITOR, made, wrong):
        assert key not in logged
        assert not [text for text in seen if key in text]


def test_what_an_administrator_asks_of_a_model_counts_and_looking_at_the_server_does_not():
    ring = make_ring()
    app = guarded_app(ring, small_settings())
    known = ring.keys()
    admin = next(key.id for key in known if key.role == "admin")
    for path in ("/v1/admin/keys", "/metrics"):
        assert ask(app, "GET", path, bearer(ADMIN)).status_code == 200
    assert ring.usage(admin)["requests"] == 0
    assert ask(app, "GET", "/v1/models", bearer(ADMIN)).status_code == 200
    assert ring.usage(admin)["requests"] == 1
