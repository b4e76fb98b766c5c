"""One upstream of a router: its connections, what it can do, how busy and how well it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from engine.server.api_key import ApiKey
from engine.server.refusals import AsgiApp
from engine.server.router.asgi_transport import ASGI_STATE, StreamingAsgiTransport
from engine.server.router.breaker import CircuitBreaker
from engine.server.router.settings import RouterSettings, UpstreamSettings

FAILED_CHECKS_TO_LEAVE = 2

_log = logging.getLogger(__name__)


class Upstream:
    """Used by one event loop. `load` is what requests are spread by: ours that it has, and those that wait
    there."""

    def __init__(
        self,
        settings: UpstreamSettings,
        router: RouterSettings,
        clock: Callable[[], float],
        app: AsgiApp | None = None,
    ):
        self.settings = settings
        self.name = settings.name
        self.breaker = CircuitBreaker(router.failures_to_open, router.backoff_s, router.max_backoff_s, clock)
        self.in_flight = 0
        self.num_waiting = 0
        self.models: dict[str, dict[str, Any]] = {name: _model(name) for name in settings.models or ()}
        self.reachable = False
        self._clock = clock
        self._router = router
        self._num_failed_checks = 0
        self._models_at: float | None = None
        self._client = _client(settings, router, app)

    @property
    def load(self) -> int:
        return self.in_flight + self.num_waiting

    @property
    def available(self) -> bool:
        return self.reachable and self.breaker.allows and self.in_flight < self.settings.max_in_flight

    @property
    def state(self) -> dict[str, Any]:
        """For the router's health."""
        return {
            "name": self.name,
            "reachable": self.reachable,
            "circuit": self.breaker.state,
            "in_flight": self.in_flight,
            "num_waiting": self.num_waiting,
            "models": list(self.models),
        }

    @contextmanager
    def taking_one(self) -> Iterator[None]:
        """Around a request: counted as in flight."""
        self.breaker.begin()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def post(
        self, path: str, headers: dict[str, str], body: bytes, key: ApiKey | None
    ) -> httpx.Response:
        """Send a request; the answer's body is still to be read, and to be closed. Raises httpx.HTTPError.

        An app of this process learns the client's `key` as `request.state.key`; nobody else does.
        """
        url = self.settings.base_url + path
        extensions = {ASGI_STATE: {"key": key}} if self.settings.url is None else {}
        request = self._client.build_request(
            "POST", url, headers=headers, content=body, extensions=extensions
        )
        return await self._client.send(request, stream=True)

    async def check(self) -> None:
        """Ask for its health and, now and then, its models; never raises for what the upstream does."""
        try:
            health = await self._get("/health")
            if self.settings.models is None and self._models_are_old():
                await self._read_models()
        except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._check_failed(error)
            return
        self._num_failed_checks = 0
        waiting = health.get("num_waiting") if isinstance(health, dict) else None
        self.num_waiting = waiting if isinstance(waiting, int) and waiting > 0 else 0
        if not self.reachable:
            _log.info("router upstream %s is reachable: %s", self.name, ", ".join(self.models) or "no models")
        self.reachable = True

    async def aclose(self) -> None:
        await self._client.aclose()

    def _check_failed(self, error: Exception) -> None:
        self._num_failed_checks += 1
        if self._num_failed_checks >= FAILED_CHECKS_TO_LEAVE:
            if self.reachable:
                _log.warning("router upstream %s is not reachable: %s", self.name, type(error).__name__)
            self.reachable = False
            self._models_at = None  # what comes back may serve others

    def _models_are_old(self) -> bool:
        return self._models_at is None or self._clock() - self._models_at >= self._router.models_interval_s

    async def _read_models(self) -> None:
        listed = await self._get("/v1/models")
        self.models = {str(model["id"]): dict(model) for model in listed["data"]}
        self._models_at = self._clock()

    async def _get(self, path: str) -> Any:
        response = await self._client.get(
            self.settings.base_url + path, timeout=self._router.health_timeout_s
        )
        if path == "/health" and response.status_code == 404:
            return {}  # it answers, and has no such path: not all that speak OpenAI's API do
        response.raise_for_status()
        try:
            return response.json()
        except ValueError:
            if path == "/health":
                return {}
            raise


def _client(settings: UpstreamSettings, router: RouterSettings, app: AsgiApp | None) -> httpx.AsyncClient:
    key = settings.key()
    return httpx.AsyncClient(
        transport=None if app is None else StreamingAsgiTransport(app),
        headers={"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})},
        timeout=httpx.Timeout(router.read_timeout_s, connect=router.connect_timeout_s),
        limits=httpx.Limits(max_connections=settings.max_in_flight + 2, max_keepalive_connections=32),
        follow_redirects=False,  # where a redirect points to is nobody's configuration
        trust_env=False,  # nor is a proxy of the environment
    )


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "router"}
