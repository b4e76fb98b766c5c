"""`/v1/admin`: keys are made, changed and withdrawn here, by who has a key with the role `admin`.

A key's secret is in the answer that makes it, and in no other. Each change is in the audit log, under the id
of the key that asked for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from engine.errors import ConfigError, OutputError
from engine.server.api_key import ApiKey, KeyStateError, UnknownKeyError
from engine.server.errors import ERROR_ANSWERS, ApiError, error_response
from engine.server.json_body import StrictRoute
from engine.server.key_limits import KeyLimits
from engine.server.keys import KeyRing


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CreateKey(_Body):
    """A new key: what it is for, what it may do, how long (seconds) and how much (names of KeyLimits)."""

    label: str = ""
    role: str = "user"
    expires_in_s: float | None = Field(None, gt=0)
    limits: dict[str, int] = {}


class RotateKey(_Body):
    """`grace_s`: seconds for which the old secret is still good."""

    grace_s: float = Field(0.0, ge=0)


class UpdateKey(_Body):
    """A label, or limits that replace all there are."""

    label: str | None = None
    limits: dict[str, int] | None = None


def _admin(request: Request) -> ApiKey:
    key: ApiKey | None = getattr(request.state, "key", None)
    if key is None or key.role != "admin":
        message = "this path needs an API key with the role admin"
        raise ApiError(403, message, code="insufficient_permissions")
    return key


Admin = Annotated[ApiKey, Depends(_admin)]


def admin_routes(keys: KeyRing) -> APIRouter:
    """The routes; each asks for the role itself too, should a middleware be missing.

    Their handlers are plain functions, run in threads: they wait for the disk.
    """
    router = APIRouter(
        prefix="/v1/admin",
        tags=["admin"],
        dependencies=[Depends(_admin)],
        route_class=StrictRoute,
        responses=ERROR_ANSWERS,
    )

    @router.post("/keys", status_code=201, summary="Create an API key")
    def create_key(body: CreateKey, admin: Admin) -> Response:
        def create() -> Response:
            limits = KeyLimits.from_mapping(body.limits)
            options = {"role": body.role, "limits": limits, "expires_in_s": body.expires_in_s}
            return _with_secret(*keys.create(body.label, actor=admin.id, **options), status=201)

        return _answered(create)

    @router.get("/keys", summary="List API keys")
    def list_keys() -> dict[str, Any]:
        shown = [_shown(key) for key in keys.keys()]  # noqa: SIM118  a key ring is no mapping
        return {"object": "list", "data": shown}

    @router.get("/keys/stats", summary="What every API key used")
    def all_stats() -> dict[str, Any]:
        data = [{"id": key_id, **used} for key_id, used in keys.stats().items()]
        return {"object": "list", "data": data}

    @router.get("/keys/{key_id}", summary="Look at an API key")
    def get_key(key_id: str) -> Response:
        return _answered(lambda: JSONResponse(_shown(keys.get(key_id))))

    @router.patch("/keys/{key_id}", summary="Change the label or the limits of an API key")
    def update_key(key_id: str, body: UpdateKey, admin: Admin) -> Response:
        def update() -> Response:
            limits = None if body.limits is None else KeyLimits.from_mapping(body.limits)
            return JSONResponse(_shown(keys.update(key_id, label=body.label, limits=limits, actor=admin.id)))

        return _answered(update)

    @router.get("/keys/{key_id}/stats", summary="What an API key used")
    def key_stats(key_id: str) -> Response:
        return _answered(lambda: JSONResponse({"id": key_id, **keys.usage(key_id)}))

    @router.post("/keys/{key_id}/rotate", summary="Give an API key a new secret")
    def rotate_key(key_id: str, admin: Admin, body: RotateKey | None = None) -> Response:
        grace_s = 0.0 if body is None else body.grace_s
        return _answered(lambda: _with_secret(*keys.rotate(key_id, grace_s=grace_s, actor=admin.id)))

    @router.post("/keys/{key_id}/suspend", summary="Refuse an API key until it is reactivated")
    def suspend_key(key_id: str, admin: Admin) -> Response:
        return _answered(lambda: JSONResponse(_shown(keys.suspend(key_id, actor=admin.id))))

    @router.post("/keys/{key_id}/reactivate", summary="Take a suspended API key again")
    def reactivate_key(key_id: str, admin: Admin) -> Response:
        return _answered(lambda: JSONResponse(_shown(keys.reactivate(key_id, actor=admin.id))))

    @router.post("/keys/{key_id}/revoke", summary="Refuse an API key for ever")
    def revoke_key(key_id: str, admin: Admin) -> Response:
        return _answered(lambda: JSONResponse(_shown(keys.revoke(key_id, actor=admin.id))))

    @router.get("/audit", summary="The last changes of API keys, the newest first")
    def audit(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        return {"object": "list", "data": keys.audit.recent(limit)}

    return router


def _answered(act: Callable[[], Response]) -> Response:
    """What `act` answers, or the error it comes to, in OpenAI's format."""
    try:
        return act()
    except UnknownKeyError as error:
        answer = ApiError(404, str(error), code="key_not_found", type="invalid_request_error")
    except KeyStateError as error:
        answer = ApiError(409, str(error), code="key_state")
    except OutputError as error:
        answer = ApiError(503, f"{error}; nothing was changed", code="storage_failed")
    except ConfigError as error:
        answer = ApiError(400, str(error), code="invalid_value")
    return error_response(answer)


def _shown(key: ApiKey) -> dict[str, Any]:
    return {"object": "api_key", **key.to_mapping()}


def _with_secret(key: ApiKey, secret: str, status: int = 200) -> Response:
    return JSONResponse({**_shown(key), "key": secret}, status, headers={"cache-control": "no-store"})
