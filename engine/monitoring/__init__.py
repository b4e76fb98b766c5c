"""Looking on at engines: Prometheus metrics, a console, a dashboard, traces. See MONITORING.md.

    counting (plain Python)                           showing
    EngineWatch ──▶ Metrics ──▶ samples    ──────▶    exposition (prometheus-client), http_server
                            └─▶ History    ──────▶    console (rich), dashboard

Nothing here is imported by an engine that nobody monitors.
"""

from engine.monitoring.dashboard import PUBLIC_PATHS, dashboard_routes
from engine.monitoring.definitions import PREFIX, Definition, Sample
from engine.monitoring.exposition import CONTENT_TYPE, metrics_text
from engine.monitoring.metrics import Metrics, Source
from engine.monitoring.monitor import Monitoring, start_monitoring

__all__ = [
    "CONTENT_TYPE",
    "PREFIX",
    "PUBLIC_PATHS",
    "Definition",
    "Metrics",
    "Monitoring",
    "Sample",
    "Source",
    "dashboard_routes",
    "metrics_text",
    "start_monitoring",
]
