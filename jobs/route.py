"""`python -m jobs.route URL…`: one OpenAI-compatible address for several servers, on this machine's loopback.

    python -m jobs.route http://10.0.0.1:8000 http://10.0.0.2:8000
    python -m jobs.route 'router.upstreams=[{name: a, url: "http://10.0.0.1:8000", api_key_env: KEY_A}]'

Requests go to who serves their model, those that begin alike to the same server, as far as that one is not
busier than the others. The servers get the key in TIDEMILL_UPSTREAM_KEY, or each the one that its
api_key_env names; what clients need is TIDEMILL_API_KEY, or a key that is made and printed. SIGTERM and
Ctrl-C end it gracefully.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from engine.errors import ConfigError
from engine.server import require_server_packages
from engine.server.router.settings import RouterSettings
from engine.server.settings import ServerSettings
from jobs.api_keys import open_keys, told_once
from jobs.command import end_by_signals, exit_code_of
from jobs.sections import section_help, take_section
from pipeline.exit_codes import ExitCode

UPSTREAM_KEY_VARIABLE = "TIDEMILL_UPSTREAM_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings:
    """host, port: where to listen; port 0 is any free one. keys_path: a file that keeps API keys and what
    they used, with a log of changes beside it; null keeps them in memory.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys_path: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"route.port={self.port}: must be from 0 to 65535")


@dataclass(frozen=True, slots=True)
class Routing:
    """All that a start is told."""

    route: RouteSettings
    router: RouterSettings
    server: ServerSettings


def read_arguments(arguments: Sequence[str]) -> Routing:
    """Raises ConfigError for what is no URL and no setting."""
    urls = [each for each in arguments if each.startswith(("http://", "https://"))]
    rest = [each for each in arguments if each not in urls]
    if urls:
        if any(each.startswith("router.upstreams=") for each in rest):
            raise ConfigError("give the URLs of servers, or router.upstreams, not both")
        rest.append(f"router.upstreams=[{', '.join(map(_as_upstream, urls))}]")
    route, rest = take_section(rest, "route", RouteSettings)
    server, rest = take_section(rest, "server", ServerSettings)
    router, rest = take_section(rest, "router", RouterSettings)
    if rest:
        raise ConfigError(
            f"{rest[0]!r} is neither a URL nor a setting of route, router or server; see --help"
        )
    return Routing(route, router, server)


def _as_upstream(url: str) -> str:
    """A server as Hydra writes it, named by its address: another router sends a template to the same one."""
    key = f", api_key_env: {UPSTREAM_KEY_VARIABLE}" if UPSTREAM_KEY_VARIABLE in os.environ else ""
    return f"{{name: {json.dumps(urlsplit(url).netloc or url)}, url: {json.dumps(url)}{key}}}"


def run_router(routing: Routing, *, on_ready: Callable[[str], None] | None = None) -> ExitCode:
    """Route until a signal. Raises TidemillError for what the user must see to."""
    require_server_packages()
    from engine.server.router.app import create_router_app
    from engine.server.serving import serve

    route, server = routing.route, routing.server
    keys, secret = open_keys(route.keys_path, required=server.require_api_key, command="python -m jobs.route")
    try:
        app = create_router_app(routing.router, server=server, keys=keys)
        told = on_ready or (lambda url: _tell(routing, url, secret))
        serve(app, server, host=route.host, port=route.port, on_ready=told)
    finally:
        keys.close()
    return ExitCode.DONE


def _tell(routing: Routing, url: str, secret: str | None) -> None:
    names = ", ".join(each.name for each in routing.router.upstreams)
    print(f"Routing {url}/v1 to {names}", flush=True)
    if secret is not None:
        print(told_once(secret, routing.route.keys_path), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Route; every expected error is one line and an exit code."""
    return exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> ExitCode:
    if not arguments or {"--help", "-h"} & set(arguments):
        print(__doc__)
        for section, cls in (
            ("route", RouteSettings),
            ("router", RouterSettings),
            ("server", ServerSettings),
        ):
            print(section_help(section, cls) + "\n")
        return ExitCode.DONE if arguments else ExitCode.BAD_CONFIG
    routing = read_arguments(arguments)
    end_by_signals()
    return run_router(routing)


if __name__ == "__main__":
    sys.exit(main())
