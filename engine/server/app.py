"""The app: every endpoint over the engines of a server, for uvicorn or any ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from engine.async_engine import AsyncEngine
from engine.memory import give_back_freed_memory
from engine.server.auth import OPEN_PATHS, install_auth
from engine.server.batches.routes import FILES_PATH, batch_routes
from engine.server.batches.uploads import OVERHEAD_BYTES
from engine.server.chat import chat_routes
from engine.server.completions import completion_routes
from engine.server.errors import install_errors
from engine.server.health import health_routes
from engine.server.keys import KeyRing
from engine.server.limits import install_limits
from engine.server.models import model_routes
from engine.server.responses import response_routes
from engine.server.served import ServedModels
from engine.server.settings import ServerSettings
from engine.server.tokens import token_routes
from engine.server.turnstile import Turnstile

if TYPE_CHECKING:
    from engine.monitoring import Metrics
    from engine.server.batches.backend import BatchBackend

_MEMORY_SECONDS = 30


def create_app(
    models: Mapping[str, AsyncEngine],
    *,
    settings: ServerSettings,
    keys: KeyRing | None = None,
    batches: BatchBackend | None = None,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The server of these models, by the names that requests use.

    Engines are started with the app and closed with it: new requests are refused, and what still runs then is
    aborted (an ASGI server lets open calls end first, see `engine.server.serving`).

    keys: who may call; without, every route is open. batches: what runs `/v1/batches`. metrics: for
    `/metrics` and `/dashboard`. Raises ConfigError for settings that do not fit the models.
    """
    served = ServedModels(models, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in served:
            model.engine.start()
        giving_back = asyncio.create_task(_give_memory_back())
        try:
            yield
        finally:
            giving_back.cancel()
            await run_in_threadpool(served.close)

    security = [] if keys is None else [Depends(HTTPBearer(auto_error=False))]
    app = FastAPI(
        title="Tidemill",
        version=_version(),
        summary="OpenAI's API over the models of this server",
        lifespan=lifespan,
        # The pages that show the document load their code from elsewhere.
        docs_url=None,
        redoc_url=None,
        dependencies=security,
    )
    app.state.keys = keys
    app.state.models = served
    install_errors(app)
    for routes in _routes(served, settings, batches, metrics):
        app.include_router(routes)
    open_paths = OPEN_PATHS
    if metrics is not None:
        open_paths |= _show_metrics(app, metrics, keys)
    if keys is not None:
        install_auth(app, keys, settings, open_paths=open_paths)
    # The limits come before everything else: nothing of a request is read that is over them.
    uploads = {} if batches is None else {FILES_PATH: batches.max_file_bytes + OVERHEAD_BYTES}
    install_limits(app, settings, max_body_bytes=uploads)
    app.add_middleware(Turnstile)
    return app


async def _give_memory_back() -> None:
    """Now and then, as long as the server runs.

    What requests leave behind lies between what stays, in the heaps of several threads, and the C library
    keeps it: of 24 MiB that a minute of 200 clients added, 22 were free.
    """
    while True:
        await asyncio.sleep(_MEMORY_SECONDS)
        await run_in_threadpool(give_back_freed_memory)


def _routes(
    served: ServedModels, settings: ServerSettings, batches: Any | None, metrics: Any | None
) -> list[APIRouter]:
    routes = [
        chat_routes(served, settings),
        completion_routes(served, settings),
        response_routes(served, settings),
        model_routes(served),
        token_routes(served, settings),
        health_routes(served, metrics),
    ]
    if batches is not None:
        routes.append(batch_routes(batches))
    return routes


def _show_metrics(app: FastAPI, metrics: Metrics, keys: KeyRing | None) -> frozenset[str]:
    """Mount the dashboard and count what keys use; the paths that are open to all."""
    from engine.monitoring import PUBLIC_PATHS, dashboard_routes
    from engine.monitoring.key_usage import KeyUsage

    dashboard_routes(app, metrics)
    if keys is not None:
        metrics.add_source(KeyUsage(keys.stats))
    return PUBLIC_PATHS


def _version() -> str:
    try:
        return version("tidemill")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
