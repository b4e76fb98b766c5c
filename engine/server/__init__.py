"""The OpenAI-compatible server: `eSurgeApiServer(engine).fire()`, or `create_app` for an ASGI server."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.server.api_server import eSurgeApiServer
    from engine.server.app import create_app
    from engine.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "eSurgeApiServer"]

_HOMES = {
    "ServerSettings": "engine.server.settings",
    "create_app": "engine.server.app",
    "eSurgeApiServer": "engine.server.api_server",
}


def __getattr__(name: str) -> Any:
    """Load on first use: the settings must be readable where the extra is not installed."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "ServerSettings":
        require_server_packages()
    return getattr(importlib.import_module(_HOMES[name]), name)


def require_server_packages() -> None:
    """Raises MissingExtraError, naming the extra, where what serves HTTP is not installed."""
    from engine.errors import MissingExtraError

    for package in ("fastapi", "uvicorn"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "server", "the server") from error
