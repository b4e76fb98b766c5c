"""SERVER.md names every endpoint and every option."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from engine.async_engine import AsyncEngine
from engine.server.app import create_app
from engine.server.keys import KeyRing
from engine.server.settings import ServerSettings
from jobs.serve import ServeSettings


def test_every_endpoint_and_option_is_named(repository: Path, engine: AsyncEngine):
    text = (repository / "engine/server/SERVER.md").read_text()
    app = create_app({"tiny": engine}, settings=ServerSettings(), keys=KeyRing())
    paths = {re.sub(r"\{\w+(:path)?\}", "{id}", path) for path in app.openapi()["paths"]}
    assert "/v1/chat/completions" in paths
    named = {path for path in paths if path in text or f"…/{path.rpartition('/')[2]}`" in text}
    assert paths - named == set()
    options = [f"server.{field.name}" for field in dataclasses.fields(ServerSettings)]
    options += [f"serve.{field.name}" for field in dataclasses.fields(ServeSettings)]
    assert [option for option in options if f"`{option}`" not in text] == []
