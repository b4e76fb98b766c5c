"""The router's app: OpenAI's API over several upstreams, for uvicorn or any ASGI server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from engine.server.auth import install_auth
from engine.server.errors import ApiError, install_errors
from engine.server.keys import KeyRing
from engine.server.limits import install_limits
from engine.server.refusals import AsgiApp, Receive, Scope, Send
from engine.server.router.forward import FORWARDED_PATHS, Forwarder
from engine.server.router.pool import UpstreamPool
from engine.server.router.settings import RouterSettings
from engine.server.settings import ServerSettings

OPEN_PATHS = ("/health", "/liveness", "/readiness")


def create_router_app(
    settings: RouterSettings,
    *,
    server: ServerSettings,
    keys: KeyRing | None = None,
    local: Mapping[str, AsgiApp] | None = None,
) -> FastAPI:
    """A router over `settings.upstreams`; those without a url are the apps of `local`, by name.

    Local apps start and end with the router's. With `keys` every path but OPEN_PATHS wants one of them, as
    on a server; tokens count for a key as far as answers say how many they took, and streams are made to.
    Upstreams get their own keys, never a client's. Raises ConfigError for upstreams that cannot be.
    """
    pool = UpstreamPool(settings, local)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for each in (local or {}).values():
                if isinstance(each, FastAPI):
                    await stack.enter_async_context(each.router.lifespan_context(each))
            stack.push_async_callback(pool.aclose)
            await pool.start()
            yield

    app = FastAPI(
        title="Tidemill router",
        summary="OpenAI's API over several servers",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    install_errors(app)
    _add_health(app, pool, keys)
    _add_models(app, pool)
    forwarder = Forwarder(pool, None if keys is None else keys.record_usage)
    for path in FORWARDED_PATHS:
        app.add_api_route(path, _forwarding(forwarder), methods=["POST"], response_class=Response, name=path)
    if keys is not None:
        install_auth(app, keys, server, open_paths=OPEN_PATHS)
    install_limits(app, server)
    return app


def _add_health(app: FastAPI, pool: UpstreamPool, keys: KeyRing | None) -> None:
    @app.get("/liveness", summary="Whether the process answers")
    async def liveness() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readiness", summary="Whether an upstream can take a request")
    async def readiness() -> Response:
        return JSONResponse(
            {"status": "ok" if pool.is_ready else "no upstream"}, 200 if pool.is_ready else 503
        )

    @app.get("/health", summary="As /readiness; with a key, also how each upstream is")
    async def health(request: Request) -> Response:
        answer: dict[str, Any] = {"status": "ok" if pool.is_ready else "no upstream"}
        if keys is None or getattr(request.state, "key", None) is not None:
            answer["upstreams"] = [each.state for each in pool.upstreams.values()]
        return JSONResponse(answer, 200 if pool.is_ready else 503)


def _add_models(app: FastAPI, pool: UpstreamPool) -> None:
    @app.get("/v1/models", summary="The models of all upstreams")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(pool.models().values())}

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        found = pool.models().get(name)
        if found is None:
            message = f"The model {name[:100]!r} does not exist."
            raise ApiError(404, message, code="model_not_found", type="invalid_request_error")
        return JSONResponse(found)


class _Forwarded(Response):
    """A response that is made by a forwarder while it is sent."""

    def __init__(self, forwarder: Forwarder):
        super().__init__()
        self._forwarder = forwarder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._forwarder(scope, receive, send)


def _forwarding(forwarder: Forwarder) -> Any:
    async def forward() -> Response:
        return _Forwarded(forwarder)

    return forward
