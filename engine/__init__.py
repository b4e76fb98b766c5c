"""Continuous batching over paged keys and values: `Engine.from_pretrained(...).generate(...)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine
    from engine.builder import EngineBuilder
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.engine import Engine as eSurge
    from engine.options import CacheConfig, Config, RequestOptions, SchedulerConfig
    from engine.outputs import CompletionOutput, RequestOutput
    from engine.sampling_params import SamplingParams
    from engine.server import eSurgeApiServer
    from engine.waiting_queue import WaitingQueue as PriorityRequestQueue

_HOMES = {
    "AsyncEngine": "engine.async_engine",
    "CacheConfig": "engine.options",
    "CompletionOutput": "engine.outputs",
    "Config": "engine.options",
    "Engine": "engine.engine",
    "EngineBuilder": "engine.builder",
    "EngineConfig": "engine.config",
    "PriorityRequestQueue": "engine.waiting_queue",
    "RequestOptions": "engine.options",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "engine.sampling_params",
    "SchedulerConfig": "engine.options",
    "eSurge": "engine.engine",
    "eSurgeApiServer": "engine.server",
}
__all__ = [
    "AsyncEngine",
    "CacheConfig",
    "CompletionOutput",
    "Config",
    "Engine",
    "EngineBuilder",
    "EngineConfig",
    "PriorityRequestQueue",
    "RequestOptions",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "eSurge",
    "eSurgeApiServer",
]
_NAMED_OTHERWISE = {"PriorityRequestQueue": "WaitingQueue", "eSurge": "Engine"}
"""What eSurge's users know by another name than it has in its module."""


def __getattr__(name: str) -> Any:
    """Load on first use: the scheduler's side must be importable without JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), _NAMED_OTHERWISE.get(name, name))
