"""Where a router sends requests, and when it stops doing so. From the configuration only, never from a
client."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """A server that speaks OpenAI's API: at `url`, or without one an app of this process, known by `name`.

    name: in logs, health and errors, and what the upstream's place among the others is made from. url:
    `http://10.0.0.2:8000`; a `/v1` at its end makes no difference. api_key: what the upstream wants; or
    `api_key_env`, the environment variable that holds it. models: the models to route to it; None asks it.
    takes_cache_salt: it knows the field `cache_salt`, so that one client's prompts are not another's cache
    hits.
    """

    name: str
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str | None = None
    models: tuple[str, ...] | None = None
    max_in_flight: int = 256
    takes_cache_salt: bool = False

    def __post_init__(self) -> None:
        where = f"router upstream {self.name!r}"
        if not self.name or not self.name.isprintable():
            raise ConfigError("a router upstream needs a name")
        if self.max_in_flight < 1:
            raise ConfigError(f"{where}: max_in_flight={self.max_in_flight} must be at least 1")
        if self.api_key is not None and self.api_key_env is not None:
            raise ConfigError(f"{where}: give api_key or api_key_env, not both")
        if self.url is not None:
            _check_url(self.url, where)

    @property
    def base_url(self) -> str:
        """What a path that begins with `/v1` is put behind."""
        return "http://app" if self.url is None else self.url.rstrip("/").removesuffix("/v1")

    def key(self) -> str | None:
        """Raises ConfigError where the environment lacks the key."""
        if self.api_key_env is None:
            return self.api_key
        if self.api_key_env not in os.environ:
            raise ConfigError(f"router upstream {self.name!r}: the variable {self.api_key_env} is not set")
        return os.environ[self.api_key_env]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Upstreams, and how requests are spread over them. Seconds end in `_s`.

    prefix_chars: of a prompt's beginning, by which requests that begin alike go to the same upstream; a
    chat's system
        message counts whole. 0 spreads by load alone.
    load_factor: no upstream gets more than this many times the average load, whatever its prompts begin
    with. max_attempts: upstreams tried for a request, while nothing of an answer has been sent.
    read_timeout_s: the longest silence of an upstream, before its answer and within it. failures_to_open:
    failed requests in a row after which an upstream is left alone, for `backoff_s`, and twice as long
        each time that it fails again, up to `max_backoff_s`.
    """

    upstreams: tuple[UpstreamSettings, ...]
    prefix_chars: int = 512
    load_factor: float = 1.25
    max_attempts: int = 3
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 300.0
    health_interval_s: float = 5.0
    health_timeout_s: float = 5.0
    models_interval_s: float = 60.0
    failures_to_open: int = 3
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    def __post_init__(self) -> None:
        names = [upstream.name for upstream in self.upstreams]
        if not names:
            raise ConfigError("router.upstreams is empty: give at least one")
        if len(set(names)) != len(names):
            raise ConfigError("two of router.upstreams have the same name")
        lowest = {"prefix_chars": 0, "load_factor": 1.0, "max_attempts": 1, "failures_to_open": 1}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in lowest and not lowest[each.name] <= value < float("inf"):
                raise ConfigError(f"router.{each.name}={value}: must be at least {lowest[each.name]}")
            if each.name.endswith("_s") and not 0 < value < float("inf"):
                raise ConfigError(f"router.{each.name}={value}: must be a number of seconds above 0")


def _check_url(url: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  a property that raises for what is no port
    except ValueError as error:
        raise ConfigError(f"{where}: url is none: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{where}: url must begin with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{where}: url holds a user or password: give api_key or api_key_env")
    if parts.query or parts.fragment:
        raise ConfigError(f"{where}: url must end with its path")
