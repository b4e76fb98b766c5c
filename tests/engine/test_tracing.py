"""A span a request, with the numbers of the request; where it goes is said by the environment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk.trace")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engine.engine import Engine
from engine.errors import ConfigError, MissingExtraError
from engine.monitoring.tracing import (
    MAX_WAITING_CONTEXTS,
    RequestTraces,
    continue_trace,
    provider_from_environment,
)
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine, tokens_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "tracestate": "vendor=1"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


@pytest.fixture
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture
def spans(engine: Engine) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = RequestTraces(provider, engine.model_name)
    engine.add_observer(traces)
    yield exporter
    engine.remove_observer(traces)
    traces.close()


def run(engine: Engine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs


def by_id(spans: InMemorySpanExporter) -> dict[str, Any]:
    finished: Any = spans.get_finished_spans()
    return {span.attributes["gen_ai.response.id"]: span for span in finished}


def test_a_span_says_what_its_request_was(engine: Engine, spans: InMemorySpanExporter):
    sampling = SamplingParams(temperature=0.7, top_p=0.9, top_k=40, seed=5, n=2, max_tokens=6, stop=("zzz",))
    (output,) = engine.generate("the answer", sampling)
    span: Any = spans.get_finished_spans()[0]
    times: Any = output.metrics
    assert span.name == "text_completion model"
    assert span.kind is SpanKind.INTERNAL
    assert span.parent is None
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tidemill",
        "gen_ai.request.model": "model",
        "gen_ai.response.model": "model",
        "gen_ai.response.id": output.request_id,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40.0,
        "gen_ai.request.seed": 5,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stop_sequences": ("zzz",),
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.output_tokens": sum(len(sample.token_ids) for sample in output.outputs),
        "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
        "gen_ai.response.finish_reasons": tuple(sample.finish_reason for sample in output.outputs),
        "tidemill.num_preemptions": 0,
    }
    attributes = dict(span.attributes or {})
    assert (
        attributes.pop("gen_ai.response.time_to_first_chunk") == times.first_token_time - times.arrival_time
    )
    assert attributes == expected
    seconds = (span.end_time - span.start_time) / 1e9
    assert seconds == pytest.approx(times.finished_time - times.arrival_time, abs=1e-5)
    assert [event.name for event in span.events] == ["first scheduled", "first token"]
    assert span.start_time <= span.events[0].timestamp <= span.events[1].timestamp <= span.end_time
    assert "answer" not in repr(attributes), "no prompt and no text"


def test_a_span_continues_its_callers_trace(engine: Engine, spans: InMemorySpanExporter):
    continue_trace(engine, "mine", CALLER, "chat")
    engine.add_request("mine", prompt="er", sampling=GREEDY)
    engine.add_request("alone", prompt="on", sampling=GREEDY)
    continue_trace(engine, "odd", {"traceparent": "nonsense"})
    engine.add_request("odd", prompt="is", sampling=GREEDY)
    run(engine)
    found = by_id(spans)
    mine = found["mine"]
    assert mine.name == "chat model"
    assert mine.kind is SpanKind.SERVER
    assert f"{mine.context.trace_id:032x}" == TRACE
    assert f"{mine.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert mine.context.trace_state.get("vendor") == "1"
    assert found["alone"].parent is None
    assert found["odd"].parent is None
    assert found["odd"].kind is SpanKind.SERVER


def test_aborted_and_late_requests_have_spans_too(engine: Engine, spans: InMemorySpanExporter):
    engine.add_request("dropped", prompt="er on", sampling=GREEDY)
    engine.step()
    engine.abort_request("dropped")
    run(engine)
    (output,) = engine.generate("er", GREEDY)
    sample = output.outputs[0]
    late = type(sample)(0, sample.token_ids, "timeout", text="")
    traces = next(each for each in engine.observers if isinstance(each, RequestTraces))
    traces.on_finished(RequestOutput("late", None, output.prompt_token_ids, (late,), True, output.metrics))
    found = by_id(spans)
    assert len(found) == 3
    assert found["dropped"].attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert found["dropped"].attributes["gen_ai.usage.input_tokens"] > 0
    assert found["dropped"].end_time > found["dropped"].start_time
    assert found["late"].status.status_code is StatusCode.ERROR
    assert found["late"].attributes["error.type"] == "timeout"
    assert found[output.request_id].status.status_code is StatusCode.UNSET


def test_traces_change_no_token(engine: Engine):
    sampling = SamplingParams(temperature=0.9, seed=2, max_tokens=12)
    before = engine.generate(["er", "on", "is an"], sampling)
    traces = RequestTraces(TracerProvider(), "model")
    engine.add_observer(traces)
    try:
        during = engine.generate(["er", "on", "is an"], sampling)
    finally:
        engine.remove_observer(traces)
    assert tokens_of(before) == tokens_of(during)


def test_callers_whose_requests_never_came_are_forgotten(engine: Engine, spans: InMemorySpanExporter):
    for number in range(MAX_WAITING_CONTEXTS + 3):
        continue_trace(engine, f"refused-{number}", CALLER)
    traces = next(each for each in engine.observers if isinstance(each, RequestTraces))
    assert len(traces._callers) == MAX_WAITING_CONTEXTS
    assert "refused-2" not in traces._callers


def test_without_traces_a_caller_is_passed_over(engine: Engine):
    assert continue_trace(engine, "mine", CALLER) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "no installed package has the trace exporter 'zipkin'"),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"},
            "OTEL_EXPORTER_OTLP_PROTOCOL=smoke: choose one of http/protobuf",
        ),
    ],
)
def test_an_exporter_that_is_not_there_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        provider_from_environment()


def test_the_environment_names_exporter_and_service(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9/base")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mill")
    provider = provider_from_environment()
    (processor,) = provider._active_span_processor._span_processors
    exporter: Any = processor.span_exporter  # type: ignore[attr-defined]
    assert exporter._endpoint == "http://127.0.0.1:9/base/v1/traces"
    assert provider.resource.attributes["service.name"] == "mill"
    provider.shutdown()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert not provider_from_environment()._active_span_processor._span_processors


def test_without_opentelemetry_the_extra_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tidemill\[otel\]'"):
        engine.start_monitoring(prometheus_port=None, enable_tracing=True)
    assert not engine.observers
