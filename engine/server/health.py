"""`GET /health` and `GET /metrics`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from engine.server.errors import ERROR_ANSWERS, ApiError
from engine.server.served import ServedModels

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Health(BaseModel):
    """ok: every engine takes requests."""

    status: Literal["ok", "failed"]
    models: dict[str, bool]
    """By name: whether its engine takes requests."""


def health_routes(models: ServedModels, metrics: Any | None) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get(
        "/health",
        response_model=Health,
        responses={**ERROR_ANSWERS, 503: {"model": Health, "description": "An engine failed or is closed."}},
    )
    async def health() -> Response:
        """200 while every engine takes requests, else 503."""
        healthy = {model.name: model.engine.healthy for model in models}
        is_well = all(healthy.values())
        answer = Health(status="ok" if is_well else "failed", models=healthy)
        return JSONResponse(answer.model_dump(), 200 if is_well else 503)

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
