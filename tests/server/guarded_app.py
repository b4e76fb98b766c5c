"""A small app behind the real middlewares, and settings for it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from engine.server.auth import install_auth
from engine.server.errors import install_errors
from engine.server.keys import KeyRing
from engine.server.settings import ServerSettings


def small_settings(**given: Any) -> ServerSettings:
    """Limits that tests can reach."""
    small = {
        "max_body_bytes": 10_000,
        "max_header_bytes": 4_000,
        "header_timeout_s": 0.5,
        "body_timeout_s": 0.5,
        "send_timeout_s": 0.5,
        "request_timeout_s": 5.0,
        "max_connections": 500,
    }
    return ServerSettings(**(small | given))


def guarded_app(keys: KeyRing, settings: ServerSettings) -> FastAPI:
    """Echoes what an endpoint sees; fails where told to."""
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        lines = [f'tokens{{key="{key_id}"}} {used["total_tokens"]}' for key_id, used in keys.stats().items()]
        return PlainTextResponse("\n".join(lines))

    @app.api_route("/v1/models", methods=["GET", "HEAD", "OPTIONS"])
    def models(request: Request) -> dict[str, Any]:
        key = request.state.key
        return {
            "key": None if key is None else key.id,
            "headers": dict(request.headers),
            "query": request.url.query,
        }

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, int]:
        return {"length": len(await request.body())}

    @app.get("/v1/fails")
    def fails(request: Request) -> None:
        raise RuntimeError(f"failed on {request.url} with {dict(request.headers)}")

    inner = FastAPI()

    @inner.get("/hidden")
    def hidden() -> dict[str, str]:
        return {"hidden": "seen"}

    app.mount("/mounted", inner)
    install_errors(app)
    install_auth(app, keys, settings)
    return app
