"""Show a job's metrics while it runs (`monitoring.*`); off unless asked for, and no part of any result."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from pipeline.work_watch import WorkWatch

if TYPE_CHECKING:
    from engine.monitoring.monitor import Monitoring
    from pipeline.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitoringSettings:
    """prometheus_port: serve /metrics there; 0 is any free port, null does not. dashboard_port: likewise the
    page /dashboard. host: the address to listen on; nothing asks for a key there. console: show rates and
    rows on standard error in the place of the progress bar. traces: a span a request, sent where the OTEL_*
    environment variables say.
    """

    prometheus_port: int | None = None
    dashboard_port: int | None = None
    host: str = "127.0.0.1"
    console: bool = False
    traces: bool = False

    def __post_init__(self) -> None:
        for name in ("prometheus_port", "dashboard_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ConfigError(
                    f"monitoring.{name}={port}: give a port from 0 (any free one) to 65535, or null"
                )

    def of_worker(self, index: int) -> MonitoringSettings:
        """Those of one of several workers that may share a machine: ports of its own, and no console."""

        def port(first: int | None) -> int | None:
            return first + index if first else first

        return replace(
            self,
            prometheus_port=port(self.prometheus_port),
            dashboard_port=port(self.dashboard_port),
            console=False,
        )

    @property
    def is_on(self) -> bool:
        return (
            self.prometheus_port is not None or self.dashboard_port is not None or self.console or self.traces
        )


class JobMonitoring:
    """Within its block what the settings ask for is shown. Made before anything slow is loaded, so that a
    port in use or a package that is missing ends the job at once.
    """

    def __init__(self, settings: MonitoringSettings, line_seconds: float):
        """line_seconds: between the console's lines where it is no terminal."""
        self._settings = settings
        self._line_seconds = line_seconds
        self._monitoring: Monitoring | None = None
        self._provider: Any = None  # of traces

    def __enter__(self) -> JobMonitoring:
        if not self._settings.is_on:
            return self
        from engine.monitoring.monitor import Monitoring

        settings, self._monitoring = self._settings, Monitoring()
        try:
            self._monitoring.serve(
                host=settings.host,
                prometheus_port=settings.prometheus_port,
                dashboard_port=settings.dashboard_port,
                options="monitoring.",
            )
            if settings.traces:
                from engine.monitoring.tracing import provider_from_environment

                self._provider = provider_from_environment()
            if settings.console:
                self._monitoring.show_console(self._line_seconds)
        except BaseException:
            self._monitoring.close()
            raise
        for name, url in self._monitoring.urls.items():
            print(f"{name}: {url}", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._monitoring is not None:
            self._monitoring.close()

    def watch(self, engine: Any, ledger: Ledger) -> WorkWatch:
        """From now on show what this engine and this run do; tell the result of the run."""
        if self._monitoring is None:
            return WorkWatch()
        from pipeline.job_metrics import JobMetrics

        self._monitoring.watch(engine)
        if self._provider is not None:
            self._monitoring.trace(engine, self._provider)
        job = JobMetrics(ledger)
        self._monitoring.metrics.add_source(job)
        return job
