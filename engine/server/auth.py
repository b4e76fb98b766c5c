"""Who may do what: API keys at the door of every route, their limits, and what they have left.

Everything is closed but what `open_paths` names, `/health` by default. What a request may do is decided on
its path and method, never on its Host header, and before anything of it but the headers is read. A path that
is not spelled as routes are opens nothing: it is as closed as any other.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import unquote

from engine.server.api_key import ApiKey
from engine.server.credentials import BadCredentials, take_key, unauthorized
from engine.server.key_limits import Allowance, Exceeded
from engine.server.keys import KeyRing
from engine.server.refusals import AsgiApp, Message, Receive, Refusal, Scope, Send, refuse
from engine.server.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

OPEN_PATHS = frozenset({"/health"})
MONITOR_PARTS = ("metrics", "dashboard")


def install_auth(
    app: FastAPI, keys: KeyRing, settings: ServerSettings, *, open_paths: Collection[str] = OPEN_PATHS
) -> None:
    """Let in what has a key of `keys`, and add the routes of `/v1/admin`.

    Afterwards `request.state.key` is the ApiKey of a request, or None. Without `require_api_key` requests
    without a key or with an unknown one are let in as nobody's, but not to `/v1/admin`; a known key counts,
    and one that is suspended, revoked or expired is refused.
    """
    from engine.server.admin import admin_routes

    app.include_router(admin_routes(keys))
    app.add_middleware(AuthMiddleware, keys=keys, settings=settings, open_paths=open_paths)


class AuthMiddleware:
    """ASGI middleware of `install_auth`, for apps that are not FastAPI's too."""

    def __init__(
        self,
        app: AsgiApp,
        *,
        keys: KeyRing,
        settings: ServerSettings,
        open_paths: Collection[str] = OPEN_PATHS,
    ):
        self._app = app
        self._keys = keys
        self._settings = settings
        self._open_paths = frozenset(open_paths)
        self._in_flight: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        # No frame of this function holds a key: frames are what tracebacks show.
        decided = self._decide(scope)
        if isinstance(decided, Refusal):
            await refuse(scope, send, decided)
            return
        scope.setdefault("state", {})["key"] = decided
        # What an administrator or a monitor has to see is there whatever its key has used.
        if self._is_open(scope) or (decided is not None and role_needed(route_path(scope)) != "user"):
            await self._app(scope, receive, send)
        elif decided is not None:
            await self._counted(decided, scope, receive, send)
        else:
            address = (scope.get("client") or ("",))[0]
            await self._beside_others(f"address {address}", scope, receive, send)

    def _decide(self, scope: Scope) -> ApiKey | Refusal | None:
        try:
            presented = take_key(scope, in_query=self._settings.api_key_in_query)
        except BadCredentials as error:
            return None if self._is_open(scope) else error.refusal
        key = None if presented is None else self._keys.find(presented)
        refusal = self._refusal(scope, key, presented is not None)
        if refusal is not None and self._is_open(scope):
            return None
        return refusal or key

    def _refusal(self, scope: Scope, key: ApiKey | None, any_given: bool) -> Refusal | None:
        needed = role_needed(route_path(scope))
        if key is None:
            if not self._settings.require_api_key and needed != "admin":
                return None
            if any_given:
                return unauthorized("Incorrect API key provided.", "invalid_api_key")
            return unauthorized(
                "You didn't provide an API key: send it as Authorization: Bearer <key> or X-API-Key: <key>.",
                "missing_api_key",
            )
        match self._keys.why_refused(key):
            case "suspended":
                return _forbidden(
                    "This API key is suspended; its administrator can reactivate it.", "key_suspended"
                )
            case "revoked":
                return unauthorized("This API key was revoked: use another.", "key_revoked")
            case "expired":
                return unauthorized("This API key has expired: use another.", "key_expired")
        if key.role == "admin" or key.role == needed:
            return None
        if needed == "monitor" and not self._settings.require_api_key:
            return None
        return _forbidden(
            f"This API key has the role {key.role}; this path needs {needed}.", "insufficient_permissions"
        )

    def _is_open(self, scope: Scope) -> bool:
        return (
            scope["type"] == "http"
            and scope["method"] in ("GET", "HEAD")
            and route_path(scope) in self._open_paths
        )

    async def _counted(self, key: ApiKey, scope: Scope, receive: Receive, send: Send) -> None:
        exceeded = self._keys.admit(key.id)
        if exceeded is not None:
            await refuse(scope, send, too_many(exceeded, self._keys.allowances(key.id)))
            return
        try:
            await self._beside_others(key.id, scope, receive, self._with_allowances(key, send))
        finally:
            self._keys.release(key.id)

    async def _beside_others(self, who: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a request unless too many of the same key or address run."""
        most = self._settings.max_concurrent_per_key
        if self._in_flight[who] >= most:
            await refuse(scope, send, too_many(Exceeded("concurrency", "concurrent", most, 1.0), {}))
            return
        self._in_flight[who] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[who] -= 1
            if not self._in_flight[who]:
                del self._in_flight[who]

    def _with_allowances(self, key: ApiKey, send: Send) -> Send:
        if not key.limits.to_mapping():
            return send

        async def send_with_allowances(message: Message) -> None:
            if message["type"] == "http.response.start":
                left = _allowance_headers(self._keys.allowances(key.id))
                raw = [(name.encode(), value.encode()) for name, value in left.items()]
                message = {**message, "headers": [*message.get("headers", ()), *raw]}
            await send(message)

        return send_with_allowances


def route_path(scope: Scope) -> str:
    """The path that routes are matched with: without the prefix under which this app is mounted."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def role_needed(path: str) -> str:
    """The role that a path needs, however it is spelled: what might be read as an admin's path is one."""
    for _ in range(3):  # escapes of escapes
        path = unquote(path)
    plain: list[str] = []
    resolved: list[str] = []
    for part in re.split(r"[/\\]+", path):
        if part == "..":
            del resolved[-1:]
        elif name := part.strip(" .").partition(";")[0].lower():
            plain.append(name)
            resolved.append(name)
    if any(("v1", "admin") in pairwise(parts) for parts in (plain, resolved)):
        return "admin"
    return "monitor" if resolved and resolved[0] in MONITOR_PARTS else "user"


def too_many(exceeded: Exceeded, allowances: Mapping[str, Allowance]) -> Refusal:
    """The 429 of a limit. One that waiting does not mend is `insufficient_quota`, which OpenAI's client does
    not retry."""
    headers = _allowance_headers(allowances)
    if exceeded.retry_after_s is None:
        message = (
            f"This API key has used its {exceeded.limit} {exceeded.kind}: ask its administrator for more."
        )
        headers["x-should-retry"] = "false"
        return Refusal(429, message, "insufficient_quota", "insufficient_quota", headers)
    seconds = max(1, math.ceil(exceeded.retry_after_s))
    headers["retry-after"] = str(seconds)
    if exceeded.kind == "concurrency":
        message = (
            f"{exceeded.limit} requests of yours run at this moment, and no more may: wait for one to end."
        )
        return Refusal(429, message, "requests", "concurrency_limit_exceeded", headers)
    most = f"{exceeded.limit} {exceeded.kind} per {exceeded.window}"
    message = f"Rate limit reached: {most}. Try again in {seconds} s."
    return Refusal(429, message, exceeded.kind, "rate_limit_exceeded", headers)


def _forbidden(message: str, code: str) -> Refusal:
    return Refusal(403, message, "permission_error", code)


def _allowance_headers(allowances: Mapping[str, Allowance]) -> dict[str, str]:
    headers = {}
    for kind, left in allowances.items():
        headers[f"x-ratelimit-limit-{kind}"] = str(left.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(left.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(left.reset_s)}s"
    return headers
