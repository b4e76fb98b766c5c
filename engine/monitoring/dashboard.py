"""The dashboard: one page without any outside resource, and the JSON that it asks for every second."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from engine.monitoring.history import INTERVAL_S, MAX_POINTS, EngineHistory, Point
from engine.monitoring.http_server import Page, Route
from engine.monitoring.metrics import Metrics, resident_bytes

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

PAGE_PATH = "/dashboard"
DATA_PATH = "/dashboard/data"
PUBLIC_PATHS = frozenset({PAGE_PATH})
"""What a server with keys may give to anyone: the page, which holds no data. What it then asks for needs a
key, which the user types into the page."""

# Digits that a chart can show.
_DIGITS = 6


def dashboard_routes(app: FastAPI, metrics: Metrics) -> None:
    """Add the dashboard of `metrics` to a server, at `/dashboard`."""
    from fastapi import Response

    metrics.remember()  # begin to remember now, not when somebody first looks
    for path, route in routes(metrics).items():

        def answer(request: Request, route: Route = route) -> Response:
            page = route(request.url.query)
            return Response(page.body, media_type=page.content_type, headers=dict(page.headers))

        app.add_route(path, answer, methods=["GET"], include_in_schema=False)


def routes(metrics: Metrics) -> dict[str, Route]:
    """Pages by path, as `http_server` serves them."""
    return {PAGE_PATH: lambda query: page(), DATA_PATH: lambda query: data(metrics, query)}


@cache
def page() -> Page:
    """The HTML, under a policy that lets it load and send nothing elsewhere."""
    html = (files("engine.monitoring") / "dashboard.html").read_text(encoding="utf-8")
    hashes = {
        tag: " ".join(
            f"'sha256-{_sha256(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return Page("text/html; charset=utf-8", html.encode(), headers)


def data(metrics: Metrics, query: str) -> Page:
    """Every engine's totals, and its points after the ones that the query names (`after.NAME=NUMBER`)."""
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    body = {
        "interval_seconds": INTERVAL_S,
        "max_points": MAX_POINTS,
        "resident_bytes": resident_bytes(),
        "facts": metrics.facts(),
        "engines": [
            _engine(history, asked.get(f"after.{name}", ""))
            for name, history in metrics.remember().engines.items()
        ],
    }
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Page("application/json", text.encode(), headers)


def _engine(history: EngineHistory, after: str) -> Mapping[str, Any]:
    watch = history.watch
    now = watch.now()
    points = history.points(int(after) if re.fullmatch(r"\d{1,15}", after) else -1)
    return {
        "name": watch.name,
        "model": watch.engine.model_name,
        "device": now.stats.device,
        "requests": now.num_ended,
        "active": now.num_active,
        "prompt_tokens": now.stats.num_prompt_tokens,
        "cached_tokens": now.stats.num_cached_tokens,
        "generated_tokens": now.stats.num_generated_tokens,
        "tokens_per_second": round(now.tokens_per_second, _DIGITS),
        "preemptions": now.stats.preemptions,
        "compile_seconds": round(now.stats.compile_seconds, 3),
        "last": history.last_number,
        "columns": {
            each.name: [_short(getattr(point, each.name)) for point in points] for each in fields(Point)
        },
    }


def _short(value: float | None) -> float | None:
    return round(value, _DIGITS) if isinstance(value, float) else value


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
