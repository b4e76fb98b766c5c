"""Start and stop what shows metrics: Prometheus' endpoint, the dashboard, the console, traces."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from engine.monitoring.console import LINE_SECONDS, ConsoleMonitor
from engine.monitoring.dashboard import PAGE_PATH
from engine.monitoring.dashboard import routes as dashboard_pages
from engine.monitoring.exposition import CONTENT_TYPE, metrics_text
from engine.monitoring.http_server import MonitoringServer, Page, Route
from engine.monitoring.metrics import Metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

PROMETHEUS_PORT = 11184
"""eSurge's."""
METRICS_PATH = "/metrics"


class Monitoring:
    """What is shown of one `Metrics`, until it is closed. A context manager.

    `urls` says where: `prometheus` and `dashboard`, of those that were asked for.
    """

    def __init__(self, metrics: Metrics | None = None):
        self.metrics = metrics or Metrics()
        self.urls: dict[str, str] = {}
        self.is_closed = False
        self._counting = ExitStack()
        self._showing = ExitStack()

    def watch(self, engine: Any, name: str | None = None) -> None:
        """Count what this engine does, until this is closed. See `Metrics.watch`."""
        self.metrics.watch(engine, name)
        self._counting.callback(self.metrics.unwatch, engine)

    def trace(self, engine: Any, provider: TracerProvider) -> None:
        """Make a span of each of its requests, until this is closed; then the provider is shut down."""
        from engine.monitoring.tracing import RequestTraces

        traces = RequestTraces(provider, engine.model_name)
        engine.add_observer(traces)
        self._counting.callback(traces.close)
        self._counting.callback(engine.remove_observer, traces)

    def serve(
        self, *, host: str, prometheus_port: int | None, dashboard_port: int | None, options: str
    ) -> None:
        """Serve what has a port; the same one for both is one server. `options`: what stands before their
        names where the user gives them, for errors.
        """
        wanted: list[tuple[str, int, str, dict[str, Route]]] = []
        if prometheus_port is not None:
            registry = self.metrics.registry
            scrape = {METRICS_PATH: lambda query: Page(CONTENT_TYPE, metrics_text(registry))}
            wanted.append(("prometheus", prometheus_port, METRICS_PATH, scrape))
        if dashboard_port is not None:
            self.metrics.remember()  # begin to remember now, not when somebody first looks
            wanted.append(("dashboard", dashboard_port, PAGE_PATH, dashboard_pages(self.metrics)))
        servers: dict[int, MonitoringServer] = {}
        for name, port, path, routes in wanted:
            server = servers.get(port) if port else None
            if server is None:
                server = servers[port] = MonitoringServer(host, port, option=f"{options}{name}_port")
                self._showing.callback(server.close)
            server.routes.update(routes)
            self.urls[name] = server.url(path)

    def show_console(self, line_seconds: float = LINE_SECONDS) -> None:
        """On standard error; `line_seconds` between lines where that is no terminal."""
        self._showing.callback(ConsoleMonitor(self.metrics, line_seconds=line_seconds).close)

    def close(self) -> None:
        """Stop listening, showing and counting. Closing twice is nothing."""
        self.is_closed = True
        self._showing.close()  # what it shows last is still counted
        self._counting.close()

    def __enter__(self) -> Monitoring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_monitoring(
    engine: Any,
    *,
    prometheus_port: int | None = PROMETHEUS_PORT,
    enable_console: bool = False,
    dashboard_port: int | None = None,
    enable_tracing: bool = False,
    host: str = "127.0.0.1",
    metrics: Metrics | None = None,
) -> Monitoring:
    """Count what an engine does and show it.

    Args:
        prometheus_port: serve `/metrics` there; 0 is any free port (`Monitoring.urls` says which), None does
            not serve it.
        enable_console: show rates, memory, hit rate and requests on standard error: live on a terminal, as
            lines elsewhere.
        dashboard_port: serve the page `/dashboard` there, likewise.
        enable_tracing: a span a request, sent where the OTEL_* environment variables say (the extra `otel`).
        host: the address to listen on. Nothing asks for a key there: other than the loopback, give one that
            only those can reach who may read the numbers.
        metrics: count here together with other engines, each under its name.

    Raises:
        ConfigError: a port is in use, or an engine of this name is counted there already.
        MissingExtraError: the extra `monitoring` (or `otel`) is needed and not installed.
    """
    monitoring = Monitoring(metrics)
    try:
        monitoring.watch(engine)
        if enable_tracing:
            from engine.monitoring.tracing import provider_from_environment

            monitoring.trace(engine, provider_from_environment())
        monitoring.serve(
            host=host, prometheus_port=prometheus_port, dashboard_port=dashboard_port, options=""
        )
        if enable_console:
            monitoring.show_console()
    except BaseException:
        monitoring.close()
        raise
    return monitoring
