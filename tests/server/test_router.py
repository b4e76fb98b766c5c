"""A router over real servers on the loopback: where requests go, what is passed on, and what happens when
one fails."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.errors import ConfigError
from engine.server.connections import uvicorn_options
from engine.server.keys import KeyRing
from engine.server.router.app import create_router_app
from engine.server.router.settings import RouterSettings, UpstreamSettings
from tests.server.guarded_app import small_settings
from tests.server.small_upstream import COMPLETE, SmallUpstream
from tests.server.uvicorn_thread import serving, serving_all, until

CHAT = "/v1/chat/completions"
FAST: dict[str, Any] = {
    "health_interval_s": 0.1,
    "backoff_s": 0.2,
    "connect_timeout_s": 1.0,
    "read_timeout_s": 2.0,
}


@contextmanager
def routing(
    *upstreams: SmallUpstream,
    keys: KeyRing | None = None,
    dead: tuple[str, ...] = (),
    of_each: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[httpx.Client]:
    """A client of a router over `upstreams`, each a server of its own, and ports `dead` that nobody listens
    to."""
    with serving_all(*upstreams) as urls, ExitStack() as stack:
        each = [
            UpstreamSettings(name=upstream.name, url=url, api_key=upstream.key, **(of_each or {}))
            for upstream, url in zip(upstreams, urls, strict=True)
        ]
        each += [UpstreamSettings(name=name, url="http://127.0.0.1:9", models=("m",)) for name in dead]
        options = {**FAST, **settings}
        app = create_router_app(
            RouterSettings(upstreams=tuple(each), **options), server=small_settings(), keys=keys
        )
        url = stack.enter_context(serving(app, **uvicorn_options(small_settings())))
        yield stack.enter_context(httpx.Client(base_url=url, timeout=10))


def body(text: str = "hello", model: str = "m", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def num_seen(*upstreams: SmallUpstream) -> list[int]:
    return [len(upstream.seen) for upstream in upstreams]


def test_a_request_goes_to_who_has_the_model_and_its_answer_comes_back_as_it_is():
    a, b = SmallUpstream("a", ["m"]), SmallUpstream("b", ["other", "shared"])
    with routing(a, b) as client:
        answer = client.post(CHAT, json=body())
        assert (answer.status_code, answer.content) == (200, COMPLETE)
        assert client.post("/v1/completions", json={"model": "other", "prompt": "x"}).status_code == 200
        assert num_seen(a, b) == [1, 1]
        assert a.seen[0]["body"] == body()
        assert b.seen[0]["path"] == "/v1/completions"
        models = client.get("/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["m", "other", "shared"]
        assert client.get("/v1/models/other").json()["owned_by"] == "b"
        assert client.get("/v1/models/none").status_code == 404
        unknown = client.post(CHAT, json=body(model="none"))
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_what_a_client_sends_beside_its_body_stays_here_and_so_does_what_an_upstream_adds():
    ring = KeyRing(api_keys={"client-key": {}})
    a = SmallUpstream("a", key="upstream-key")
    with routing(a, keys=ring) as client:
        sent = {
            "authorization": "Bearer client-key",
            "cookie": "session=1",
            "connection": "keep-alive, x-mine",
            "x-mine": "1",
            "te": "trailers",
            "x-forwarded-for": "10.0.0.1",
            "proxy-authorization": "Basic abc",
            "x-request-id": "id-7",
        }
        answer = client.post(CHAT, json=body(), headers=sent)
        assert answer.status_code == 200
        seen = a.seen[0]["headers"]
        assert seen["authorization"] == "Bearer upstream-key"
        assert seen["x-request-id"] == "id-7"
        assert not {"cookie", "x-mine", "te", "x-forwarded-for", "proxy-authorization", "x-api-key"} & set(
            seen
        )
        assert "client-key" not in str(a.seen)
        assert not {"set-cookie", "keep-alive", "x-secret"} & set(answer.headers)
        by_header = client.post(CHAT, json=body(), headers={"x-api-key": "client-key"})
        assert by_header.status_code == 200
        assert "client-key" not in str(a.seen)
        assert client.post(CHAT, json=body()).status_code == 401


def test_no_address_comes_from_a_client_or_an_upstream():
    a, other = SmallUpstream(), SmallUpstream("elsewhere")
    with serving(other) as elsewhere, routing(a) as client:
        host = elsewhere.removeprefix("http://")
        for path in (f"/{elsewhere}{CHAT}", f"{CHAT}/../../{host}", "/v1/admin/keys", "/v1/files"):
            assert client.post(path, json=body()).status_code in (404, 405), path
        headers = {"host": host, "x-forwarded-host": host, "x-upstream": elsewhere}
        assert client.post(CHAT, json=body(url=elsewhere), headers=headers).status_code == 200
        a.faults, a.redirect = [307], f"{elsewhere}{CHAT}"
        redirected = client.post(CHAT, json=body())
        assert redirected.status_code == 307
        assert "location" not in redirected.headers
        assert num_seen(a, other) == [2, 0]


def test_events_are_passed_on_as_they_come():
    a = SmallUpstream(event_seconds=0.15)
    with routing(a) as client:
        came = []
        with client.stream("POST", CHAT, json=body(stream=True)) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            came = [(time.monotonic(), chunk) for chunk in answer.iter_raw()]
        assert len(came) >= 4
        assert came[2][0] - came[0][0] > 0.2
        text = b"".join(chunk for _, chunk in came).decode()
        assert [f"word{n} " in text for n in range(3)] == [True] * 3
        assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_when_the_client_goes_the_upstream_is_closed(stream: bool):
    a = SmallUpstream(num_events=1000, event_seconds=0.02, faults=[] if stream else ["hang"])
    with routing(a) as client:
        if stream:
            with client.stream("POST", CHAT, json=body(stream=True)) as answer:
                chunks = answer.iter_raw()
                assert b"word0" in next(chunks)
                assert a.num_open == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body(), timeout=0.3)
        until(lambda: a.num_open == 0, 1.5)
        assert a.num_events_sent < 100
        until(lambda: client.get("/health").json()["upstreams"][0]["in_flight"] == 0)


def test_another_upstream_is_tried_where_one_fails_before_its_answer():
    faults: list[int | str] = []
    a, b = SmallUpstream("a", faults=faults), SmallUpstream("b", faults=faults)
    with routing(a, b, failures_to_open=100) as client:
        for number, fault in enumerate((429, 502, 503, 504, "close"), start=1):
            faults[:] = [fault]  # of whoever is asked first
            answer = client.post(CHAT, json=body(stream=True))
            assert answer.status_code == 200, fault
            assert "[DONE]" in answer.text
            assert num_seen(a, b) == [number, number]


def test_who_cannot_be_connected_to_costs_nothing():
    a = SmallUpstream("a")
    with routing(a, dead=("b", "c")) as client:
        for number in range(8):
            assert client.post(CHAT, json=body(f"prompt {number}")).status_code == 200
        assert num_seen(a) == [8]


def test_a_request_that_may_leave_something_behind_is_not_sent_twice():
    faults: list[int | str] = []
    a, b = SmallUpstream("a", faults=faults), SmallUpstream("b", faults=faults)
    stored = [("/v1/responses", {"model": "m", "input": "x"}), (CHAT, body(store=True))]
    with routing(a, b, failures_to_open=100) as client:
        for number, (path, sent) in enumerate(stored, start=1):
            faults[:] = ["close", "close"]
            answer = client.post(path, json=sent)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
            assert sum(num_seen(a, b)) == number
        faults[:] = [503]  # refused before it ran
        for path, sent in stored:
            assert client.post(path, json=sent).status_code == 200


def test_an_error_that_is_the_requests_own_is_passed_on_and_tried_once():
    faults: list[int | str] = []
    a, b = SmallUpstream("a", faults=faults), SmallUpstream("b", faults=faults)
    with routing(a, b) as client:
        for number, status in enumerate((400, 404, 422, 500), start=1):
            faults[:] = [status, status]
            answer = client.post(CHAT, json=body())
            assert answer.status_code == status
            assert answer.json() == {"error": {"message": "of the upstream"}}
            assert sum(num_seen(a, b)) == number


def test_where_all_are_busy_the_client_is_told_when_to_come_back():
    with routing(SmallUpstream("a", faults=[429]), SmallUpstream("b", faults=[429])) as client:
        answer = client.post(CHAT, json=body())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")


def test_an_answer_that_breaks_off_is_not_begun_anew_and_its_client_can_tell():
    a, b = SmallUpstream("a", faults=["break"]), SmallUpstream("b", faults=["break"])
    with routing(a, b) as client:
        with (
            client.stream("POST", CHAT, json=body(stream=True)) as answer,
            pytest.raises(httpx.RemoteProtocolError, match="incomplete"),
        ):
            answer.read()
        assert sum(num_seen(a, b)) == 1


def test_an_upstream_that_does_not_answer_in_time_is_a_504():
    with routing(SmallUpstream("a", faults=["hang"]), read_timeout_s=0.3) as client:
        answer = client.post(CHAT, json=body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")


def test_who_fails_again_and_again_is_left_alone_and_taken_back():
    a = SmallUpstream("a", faults=[502] * 3)
    with routing(a, failures_to_open=3, backoff_s=0.5) as client:
        for _ in range(3):
            assert client.post(CHAT, json=body()).status_code == 502
        assert client.get("/health").json()["upstreams"][0]["circuit"] == "open"
        refused = client.post(CHAT, json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_upstream")
        assert client.get("/readiness").status_code == 503
        assert client.get("/liveness").status_code == 200
        assert num_seen(a) == [3]
        until(lambda: client.get("/readiness").status_code == 200)
        assert client.post(CHAT, json=body()).status_code == 200


def test_who_is_not_well_gets_nothing_until_it_is():
    a, b = SmallUpstream("a"), SmallUpstream("b")
    with routing(a, b, max_attempts=1) as client:
        a.is_well = False
        until(lambda: not client.get("/health").json()["upstreams"][0]["reachable"])
        for number in range(6):
            assert client.post(CHAT, json=body(f"prompt {number}")).status_code == 200
        assert num_seen(a, b) == [0, 6]
        a.is_well = True
        until(lambda: client.get("/health").json()["upstreams"][0]["reachable"])


def test_prompts_that_begin_alike_go_to_one_upstream_and_others_spread():
    many = [SmallUpstream(name) for name in "abc"]
    with routing(*many, load_factor=4.0) as client:
        for template in range(12):
            before = num_seen(*many)
            for row in range(3):
                client.post(CHAT, json=body(f"Template {template}: " + "x" * 600 + f" row {row}"))
            after = num_seen(*many)
            assert sorted(new - old for new, old in zip(after, before, strict=True)) == [0, 0, 3]
        assert sum(count > 0 for count in num_seen(*many)) == 3


def test_one_template_is_not_sent_to_one_upstream_beyond_its_bound():
    many = [SmallUpstream(name, num_events=10, event_seconds=0.05) for name in "ab"]
    with routing(*many, load_factor=1.25) as client:
        threads = [
            threading.Thread(target=client.post, args=(CHAT,), kwargs={"json": body("same", stream=True)})
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = sorted(num_seen(*many))
        assert sum(counts) == 16
        assert counts[0] >= 5, counts


def test_keys_quotas_hold_at_the_router():
    ring = KeyRing(api_keys={"k": {"tokens_per_lifetime": 25}})
    (key,) = ring.keys()
    with routing(SmallUpstream(), keys=ring) as client:
        client.headers["authorization"] = "Bearer k"
        assert client.post(CHAT, json=body()).content == COMPLETE
        until(lambda: ring.usage(key.id)["total_tokens"] == 7)
        plain = client.post(CHAT, json=body(stream=True))
        assert "usage" not in plain.text
        assert plain.text.count("data: ") == 4
        asked = client.post(CHAT, json=body(stream=True, stream_options={"include_usage": True}))
        assert '"usage"' in asked.text
        until(lambda: ring.usage(key.id)["total_tokens"] == 7 + 11 + 11)
        assert client.post(CHAT, json=body()).json()["error"]["code"] == "insufficient_quota"


def test_health_says_more_to_who_has_a_key():
    with routing(SmallUpstream(), keys=KeyRing(api_keys=["k"])) as client:
        assert client.get("/health").json() == {"status": "ok"}
        known = client.get("/health", headers={"x-api-key": "k"}).json()
        assert known["upstreams"][0]["name"] == "a"
        assert client.get("/v1/models").status_code == 401


def test_one_clients_cache_is_not_anothers():
    ring = KeyRing(api_keys={"k1": {}, "k2": {}})
    a = SmallUpstream()
    with routing(a, keys=ring, of_each={"takes_cache_salt": True}) as client:
        for key in ("k1", "k2", "k1"):
            client.post(CHAT, json=body(cache_salt="mine"), headers={"x-api-key": key})
        first, second, third = (seen["body"]["cache_salt"] for seen in a.seen)
        assert first == third != second
        assert "mine" not in (first, second)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b"\xff", "invalid_json"),
        (b'{"messages": []}', "missing_model"),
        (b'{"model": 5}', "missing_model"),
        (b"[" * 70, "too_deep"),
    ],
)
def test_a_body_that_nobody_could_take_is_refused_here(content: bytes, code: str):
    async def call() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(local_router()), base_url="http://r"
        ) as client:
            return await client.post(CHAT, content=content)

    answer = asyncio.run(call())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def local_router(upstream: SmallUpstream | None = None) -> FastAPI:
    settings = RouterSettings(upstreams=(UpstreamSettings(name="here", models=("m",)),), **FAST)
    return create_router_app(settings, server=small_settings(), local={"here": upstream or SmallUpstream()})


def test_an_app_of_this_process_is_streamed_from_and_told_when_its_client_goes():
    here = SmallUpstream(num_events=1000, event_seconds=0.02)
    with serving(local_router(here)) as url, httpx.Client(base_url=url) as client:
        with client.stream("POST", CHAT, json=body(stream=True)) as answer:
            chunks = answer.iter_raw()
            assert json.loads(next(chunks).removeprefix(b"data: "))["choices"]
            assert here.num_open == 1
        until(lambda: here.num_open == 0, 1.5)
        assert here.num_events_sent < 100
        here.num_events, here.event_seconds = 3, 0.0
        assert client.post(CHAT, json=body()).content == COMPLETE
        assert client.post(CHAT, json=body(stream=True)).text.endswith("[DONE]\n\n")
        here.faults = ["close"]
        assert client.post(CHAT, json=body()).status_code == 502


def test_a_previous_response_is_only_known_where_it_was_made():
    with routing(SmallUpstream("a"), SmallUpstream("b")) as client:
        answer = client.post("/v1/responses", json={"model": "m", "input": "x", "previous_response_id": "r"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_value")
    with routing(SmallUpstream("a")) as client:
        sent = {"model": "m", "input": "x", "previous_response_id": "r"}
        assert client.post("/v1/responses", json=sent).status_code == 200


def test_an_upstream_is_a_url_or_an_app():
    for upstream, local in (
        (UpstreamSettings(name="a"), {}),
        (UpstreamSettings(name="a", url="http://host"), {"a": SmallUpstream()}),
    ):
        with pytest.raises(ConfigError, match="must have a url or be an app"):
            create_router_app(RouterSettings(upstreams=(upstream,)), server=small_settings(), local=local)
