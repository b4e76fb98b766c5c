"""Keys are made and withdrawn over HTTP by an admin, and what one does is in the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.server.admin import admin_routes
from engine.server.audit import AuditLog
from engine.server.errors import install_errors
from engine.server.keys import KeyRing
from tests.server.guarded_app import guarded_app, small_settings

ADMIN = "the-admins-key"


class Client:
    """Calls to an app in this process with one key, as `client.post(path, {…})`."""

    def __init__(self, ring: KeyRing, key: str):
        self._app = guarded_app(ring, small_settings())
        self._headers = {"authorization": f"Bearer {key}"}

    def __call__(self, method: str, path: str, body: Any = None) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, json=body, headers=self._headers)

        return asyncio.run(call())

    def get(self, path: str) -> httpx.Response:
        return self("GET", path)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self("POST", path, body)


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[KeyRing]:
    audit = AuditLog(tmp_path / "audit.jsonl")
    ring = KeyRing(tmp_path / "keys.json", api_keys={ADMIN: {"role": "admin", "label": "root"}}, audit=audit)
    yield ring
    ring.close()


def test_the_life_of_a_key(ring: KeyRing):
    admin = Client(ring, ADMIN)
    body = {"label": "team", "limits": {"requests_per_day": 5}, "expires_in_s": 3600.0}
    created = admin.post("/v1/admin/keys", body)
    assert created.status_code == 201
    assert created.headers["cache-control"] == "no-store"
    key_id, secret = created.json()["id"], created.json()["key"]
    assert Client(ring, secret).get("/v1/models").json()["key"] == key_id

    shown = admin.get(f"/v1/admin/keys/{key_id}")
    assert "key" not in shown.json()
    assert shown.json()["limits"] == {"requests_per_day": 5}
    assert shown.json()["expires_at"] > shown.json()["created_at"]
    listed = admin.get("/v1/admin/keys").json()
    assert [key["label"] for key in listed["data"]] == ["root", "team"]

    rotated = admin.post(f"/v1/admin/keys/{key_id}/rotate").json()["key"]
    assert Client(ring, secret).get("/v1/models").status_code == 401
    user = Client(ring, rotated)
    assert user.get("/v1/models").status_code == 200
    assert admin.post(f"/v1/admin/keys/{key_id}/suspend").json()["status"] == "suspended"
    assert user.get("/v1/models").status_code == 403
    assert admin.post(f"/v1/admin/keys/{key_id}/reactivate").json()["status"] == "active"
    assert user.get("/v1/models").status_code == 200

    changed = admin("PATCH", f"/v1/admin/keys/{key_id}", {"limits": {"max_concurrent": 2}}).json()
    assert (changed["label"], changed["limits"]) == ("team", {"max_concurrent": 2})

    ring.record_usage(key_id, 10, 20)
    stats = admin.get(f"/v1/admin/keys/{key_id}/stats").json()
    assert (stats["requests"], stats["prompt_tokens"], stats["completion_tokens"]) == (3, 10, 20)
    assert [each["id"] for each in admin.get("/v1/admin/keys/stats").json()["data"]] == [
        key["id"] for key in listed["data"]
    ]

    assert admin.post(f"/v1/admin/keys/{key_id}/revoke").json()["status"] == "revoked"
    assert user.get("/v1/models").status_code == 401
    assert admin.post(f"/v1/admin/keys/{key_id}/reactivate").status_code == 409

    events = admin.get("/v1/admin/audit?limit=20").json()["data"]
    actions = ["revoke", "update", "reactivate", "suspend", "rotate", "create", "provision"]
    assert [event["action"] for event in events] == [f"key.{action}" for action in actions]
    assert {event["actor"] for event in events[:-1]} == {ring.keys()[0].id}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/admin/keys", {"role": "root"}, 400),
        ("POST", "/v1/admin/keys", {"limits": {"tokens_per_week": 1}}, 400),
        ("POST", "/v1/admin/keys", {"limits": {"tokens_per_day": 0}}, 400),
        ("POST", "/v1/admin/keys", {"label": "x" * 201}, 400),
        ("POST", "/v1/admin/keys", {"label": "bell\u0007"}, 400),
        ("POST", "/v1/admin/keys", {"surprise": 1}, 400),
        ("POST", "/v1/admin/keys", {"expires_in_s": 0}, 400),
        ("GET", "/v1/admin/keys/key-none", None, 404),
        ("POST", "/v1/admin/keys/key-none/rotate", None, 404),
        ("POST", "/v1/admin/keys/key-none/revoke", None, 404),
        ("GET", "/v1/admin/audit?limit=0", None, 400),
    ],
)
def test_bad_calls_change_nothing(ring: KeyRing, method: str, path: str, body: Any, status: int):
    answer = Client(ring, ADMIN)(method, path, body)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(ring.keys()) == 1


def test_a_key_that_cannot_be_stored_is_not_made(ring: KeyRing, monkeypatch: pytest.MonkeyPatch):
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    answer = Client(ring, ADMIN).post("/v1/admin/keys", {})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "storage_failed"
    assert len(ring.keys()) == 1


def test_the_routes_are_closed_even_where_the_door_is_missing(ring: KeyRing):
    app = FastAPI()
    app.include_router(admin_routes(ring))
    install_errors(app)

    async def call() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            headers = {"authorization": f"Bearer {ADMIN}"}
            return [await client.request(*each, headers=headers) for each in calls]

    calls = [("GET", "/v1/admin/keys"), ("POST", "/v1/admin/keys"), ("GET", "/v1/admin/audit")]
    for answer in asyncio.run(call()):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert len(ring.keys()) == 1
