"""The upstreams of a router together: who can take a request, in which order, and what they serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import ConfigError
from engine.server.refusals import AsgiApp
from engine.server.router.beginning import prompt_beginning
from engine.server.router.ring import HashRing, by_load, by_prefix
from engine.server.router.settings import RouterSettings
from engine.server.router.upstream import Upstream

DEFAULT_MODEL = "default"


class UpstreamPool:
    """Used by one event loop, between `start` and `aclose`."""

    def __init__(
        self,
        settings: RouterSettings,
        local: Mapping[str, AsgiApp] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        local = local or {}
        for each in settings.upstreams:
            if (each.url is None) != (each.name in local):
                raise ConfigError(
                    f"router upstream {each.name!r} must have a url or be an app of this process"
                )
        self.settings = settings
        self.upstreams = {
            each.name: Upstream(each, settings, clock, local.get(each.name)) for each in settings.upstreams
        }
        self._ring = HashRing(self.upstreams)
        self._checks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look at every upstream once, then again and again in the background."""
        await asyncio.gather(*(each.check() for each in self.upstreams.values()))
        self._checks = [asyncio.create_task(self._keep_checking(each)) for each in self.upstreams.values()]

    async def aclose(self) -> None:
        for task in self._checks:
            task.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await asyncio.gather(*(each.aclose() for each in self.upstreams.values()))

    @property
    def is_ready(self) -> bool:
        return any(each.available for each in self.upstreams.values())

    def models(self) -> dict[str, dict[str, Any]]:
        """What is served by any upstream that can be reached, by name."""
        found: dict[str, dict[str, Any]] = {}
        for each in self.upstreams.values():
            if each.reachable:
                found |= {name: model for name, model in each.models.items() if name not in found}
        return found

    def serving(self, model: str) -> list[Upstream]:
        """The upstreams with `model`, whether or not they can take a request now."""
        if model == DEFAULT_MODEL and len(known := self.models()) == 1:
            model = next(iter(known))
        return [each for each in self.upstreams.values() if model in each.models]

    def order(self, model: str, body: Mapping[str, Any]) -> list[Upstream]:
        """Those that can take a request now, the one to ask first in front."""
        loads = {each.name: each.load for each in self.serving(model) if each.available}
        if not loads:
            return []
        beginning = prompt_beginning(body, self.settings.prefix_chars)
        if beginning is None:
            names = by_load(loads)
        else:
            names = by_prefix(self._ring.order(beginning), loads, self.settings.load_factor)
        return [self.upstreams[name] for name in names]

    async def _keep_checking(self, upstream: Upstream) -> None:
        while True:
            await asyncio.sleep(self.settings.health_interval_s)
            await upstream.check()
