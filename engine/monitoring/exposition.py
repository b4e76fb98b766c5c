"""Metrics in Prometheus' text format, by prometheus-client (the extra `monitoring`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from engine.errors import MissingExtraError
from engine.monitoring.definitions import PREFIX, Definition, Sample
from engine.monitoring.histogram import HistogramCounts

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from engine.monitoring.metrics import Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_registry(metrics: Metrics) -> CollectorRegistry:
    """A registry that reads `metrics`, and this process's memory and CPU time, when it is asked.

    Raises MissingExtraError without prometheus-client.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise MissingExtraError("prometheus-client", "monitoring", "serving metrics") from error
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Collector(metrics))
    prometheus_client.ProcessCollector(namespace=PREFIX.rstrip("_"), registry=registry)
    return registry


def metrics_text(registry: CollectorRegistry) -> bytes:
    """What a scrape is answered with, of the type `CONTENT_TYPE`."""
    from prometheus_client import generate_latest

    return generate_latest(registry)


class _Collector:
    """Asked by the registry at each scrape."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def describe(self) -> list[Any]:
        """The registry asks for no names beforehand: sources may come later."""
        return []

    def collect(self) -> Iterator[Any]:
        samples = sorted(self._metrics.samples(), key=lambda sample: sample.definition.name)
        for definition, each in groupby(samples, key=lambda sample: sample.definition):
            yield _family(definition, list(each))


def _family(definition: Definition, samples: list[Sample]) -> Any:
    from prometheus_client import core

    name, text, labels = definition.full_name, definition.help, definition.labels
    if definition.kind == "counter":
        family: Any = core.CounterMetricFamily(name, text, labels=labels)
    elif definition.kind == "histogram":
        family = core.HistogramMetricFamily(name, text, labels=labels)
    else:  # an info is a gauge of 1 whose labels say it
        family = core.GaugeMetricFamily(name, text, labels=labels)
    for sample in samples:
        if isinstance(sample.value, HistogramCounts):
            family.add_metric(sample.labels, _buckets(sample.value), sample.value.total)
        else:
            family.add_metric(sample.labels, sample.value)
    return family


def _buckets(counts: HistogramCounts) -> list[tuple[str, float]]:
    """Upper bounds, and how many values are not above each."""
    from prometheus_client.utils import floatToGoString

    bounds = [*map(floatToGoString, counts.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(counts.counts)), strict=True))
