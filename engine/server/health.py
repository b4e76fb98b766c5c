"""`GET /health` and `GET /metrics`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from engine.server.errors import ERROR_ANSWERS, ApiError
from engine.server.served import ServedModels

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Health(BaseModel):
    """ok: every engine takes requests. The rest is for who has a key, and for all where none is wanted."""

    status: Literal["ok", "failed"]
    models: dict[str, bool] | None = None
    """By name: whether its engine takes requests."""
    num_running: int | None = None
    """Requests in the steps of all engines; left out while one has failed."""
    num_waiting: int | None = None
    """Requests that have no place in a step yet, by which a router spreads its own."""


def health_routes(models: ServedModels, metrics: Any | None) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get(
        "/health",
        response_model=Health,
        responses={**ERROR_ANSWERS, 503: {"model": Health, "description": "An engine failed or is closed."}},
    )
    async def health(request: Request) -> Response:
        """200 while every engine takes requests, else 503."""
        healthy = {model.name: model.engine.healthy for model in models}
        is_well = all(healthy.values())
        answer = Health(status="ok" if is_well else "failed")
        if request.app.state.keys is None or getattr(request.state, "key", None) is not None:
            answer.models = healthy
            if is_well:
                answer.num_running = sum(model.engine.engine.totals().running for model in models)
                unfinished = sum(model.engine.num_unfinished for model in models)
                answer.num_waiting = max(0, unfinished - answer.num_running)
        return JSONResponse(answer.model_dump(exclude_none=True), 200 if is_well else 503)

    @routes.get(
        "/metrics",
        response_class=Response,
        responses={**ERROR_ANSWERS, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    def metrics_page() -> Response:
        """All metrics in Prometheus's text format; 404 where monitoring is off."""
        if metrics is None:
            raise ApiError(404, "monitoring is off on this server", code="monitoring_off")
        from engine.monitoring import metrics_text

        return Response(metrics_text(metrics.registry), media_type=PROMETHEUS_TEXT)

    return routes
