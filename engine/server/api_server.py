"""eSurge's API server: `eSurgeApiServer(engine).fire()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.monitoring import Metrics
from engine.server.app import create_app
from engine.server.keys import KeyRing
from engine.server.serving import serve
from engine.server.settings import ServerSettings

AnyEngine = Engine | AsyncEngine


class eSurgeApiServer:
    """An OpenAI-compatible server of one engine, or of several by name.

    Args:
        engine: one, which requests call by its name or "default", or a mapping of names to engines.
        require_api_key: refuse requests without a key; otherwise keys that are given are counted only.
        api_keys: keys known beforehand, `{"demo-key": {"label": "UI"}}`, or a list of them.
        options: any further field of `ServerSettings`.

    Raises:
        ConfigError: for options that do not exist, or do not fit the models.
    """

    def __init__(
        self,
        engine: AnyEngine | Mapping[str, AnyEngine],
        *,
        require_api_key: bool = False,
        api_keys: Mapping[str, Mapping[str, Any]] | Sequence[str] = (),
        **options: Any,
    ):
        self.settings = ServerSettings.of(require_api_key=require_api_key, **options)
        self.keys = KeyRing(api_keys=api_keys)
        self.metrics = Metrics()
        engines = engine if isinstance(engine, Mapping) else {_name_of(engine): engine}
        self.models = {name: self._as_async(each) for name, each in engines.items()}
        for name, each in self.models.items():
            self.metrics.watch(each.engine, name)
        self.app: FastAPI = create_app(
            self.models, settings=self.settings, keys=self.keys, metrics=self.metrics
        )

    def generate_api_key(self, label: str = "", **options: Any) -> str:
        """A new key, which is shown this once; `options` as of `KeyRing.create`."""
        return self.keys.generate_api_key(label, **options)

    def fire(
        self, host: str = "127.0.0.1", port: int = 8000, *, on_ready: Callable[[str], None] | None = None
    ) -> None:
        """Serve until SIGTERM or Ctrl-C; the engines are closed then. See `engine.server.serving.serve`."""
        serve(self.app, self.settings, host=host, port=port, on_ready=on_ready)

    def _as_async(self, engine: AnyEngine) -> AsyncEngine:
        if isinstance(engine, AsyncEngine):
            return engine
        return AsyncEngine(engine, max_waiting=self.settings.max_waiting)


def _name_of(engine: AnyEngine) -> str:
    return (engine.engine if isinstance(engine, AsyncEngine) else engine).model_name
