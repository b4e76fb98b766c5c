"""The server's metrics, dashboard and traces say what its callers did, those that were cut short included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.monitoring import Monitoring
from engine.sampling_params import SamplingParams
from engine.server.app import create_app
from engine.server.settings import ServerSettings
from tests.engine.engines import tiny_engine

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def monitoring(spans: InMemorySpanExporter) -> Iterator[Monitoring]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with Monitoring() as made:
        made.watch(tiny_engine(), "model")
        made.trace(tiny_engine(), provider)
        yield made


def statuses(monitoring: Monitoring) -> dict[str, int]:
    return monitoring.metrics.watches[0].now().num_ended


def test_requests_that_are_ended_from_outside_count_once(monitoring: Monitoring, spans: InMemorySpanExporter):
    engine: Engine = tiny_engine()
    for name in ("leads", "follows", "dropped"):
        engine.add_request(name, prompt="er on is", sampling=GREEDY)
    for _ in range(4):
        engine.step()
    assert engine.end_request("follows", "timeout") is not None
    assert engine.end_request("leads", "abort") is not None
    assert engine.end_request("leads", "abort") is None
    assert engine.abort_request("dropped")
    while engine.has_unfinished:
        engine.step()
    assert statuses(monitoring) == {"completed": 0, "aborted": 2, "timeout": 1}
    found: Any = spans.get_finished_spans()
    reasons = {
        each.attributes["gen_ai.response.id"]: each.attributes["gen_ai.response.finish_reasons"]
        for each in found
    }
    assert reasons == {"follows": ("timeout",), "leads": ("abort",), "dropped": ("abort",)}


def test_a_call_continues_its_callers_trace_and_is_seen(monitoring: Monitoring, spans: InMemorySpanExporter):
    models = {"model": AsyncEngine(tiny_engine())}
    app = create_app(models, settings=ServerSettings(), metrics=monitoring.metrics)
    body = {"model": "model", "max_tokens": 3}
    with TestClient(app) as client:
        for path, asked in (
            ("chat/completions", {"messages": [{"role": "user", "content": "er"}]}),
            ("completions", {"prompt": "er"}),
        ):
            headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
            assert client.post(f"/v1/{path}", json=body | asked, headers=headers).status_code == 200
        (engine,) = client.get("/dashboard/data").json()["engines"]
        assert engine["requests"] == {"completed": 2, "aborted": 0, "timeout": 0}
        assert 'tidemill_requests_total{engine="model",status="completed"} 2.0' in client.get("/metrics").text
        assert client.get("/dashboard").headers["content-security-policy"]
    found: Any = spans.get_finished_spans()
    assert [span.name for span in found] == ["chat model", "text_completion model"]
    assert {f"{span.context.trace_id:032x}" for span in found} == {TRACE}
