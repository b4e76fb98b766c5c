"""OpenTelemetry traces: a span a request, named and described by the semantic conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/).

A span is made when its request ends, with the times that the engine kept. Prompts and texts are never part of
it. Where spans go is said by the standard OTEL_* environment variables: OTEL_TRACES_EXPORTER (otlp, console,
none), OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME and the others.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, MissingExtraError
from engine.observer import EngineObserver

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

    from engine.outputs import RequestOutput
    from engine.sampling_params import SamplingParams

# Requests whose headers came and that were then refused are forgotten, the oldest first.
MAX_WAITING_CONTEXTS = 4096
_EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


def continue_trace(
    engine: Any, request_id: str, headers: Mapping[str, str], operation: str = "text_completion"
) -> None:
    """Let a request's span be a child of the caller's; call it before the request is added.

    headers: of the HTTP request, by lower-case name; `traceparent` and `tracestate` are read (W3C).
    operation: "chat", "text_completion" or another `gen_ai.operation.name`.
    Nothing is to be done where the engine has no traces.
    """
    for observer in engine.observers:
        if isinstance(observer, RequestTraces):
            observer.continue_trace(request_id, headers, operation)


def provider_from_environment() -> TracerProvider:
    """A provider with the exporters that the OTEL_* variables name (OTLP over HTTP where they name none).

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
        ConfigError: they name an exporter or protocol that is not there.
    """
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingExtraError("opentelemetry-sdk", "otel", "tracing requests") from error
    provider = TracerProvider()
    for name in os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        exporter = _exporter(name.strip())
        if exporter is not None:
            provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class RequestTraces(EngineObserver):
    """Makes the spans of one engine's requests. `provider` says what becomes of them."""

    def __init__(self, provider: TracerProvider, model_name: str):
        self._provider = provider
        self._model_name = model_name
        self._tracer = provider.get_tracer("tidemill")
        self._callers: OrderedDict[str, tuple[Context, str]] = OrderedDict()
        self._running: dict[str, tuple[int, int, SamplingParams]] = {}

    def continue_trace(self, request_id: str, headers: Mapping[str, str], operation: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._callers[request_id] = (TraceContextTextMapPropagator().extract(dict(headers)), operation)
        while len(self._callers) > MAX_WAITING_CONTEXTS:
            self._callers.popitem(last=False)

    def on_added(self, request_id: str, num_prompt_tokens: int, sampling: SamplingParams) -> None:
        self._running[request_id] = (time.time_ns(), num_prompt_tokens, sampling)

    def on_finished(self, output: RequestOutput) -> None:
        since_epoch = time.time_ns() - time.monotonic_ns()

        def unix_ns(seconds: float) -> int:
            return since_epoch + int(seconds * 1e9)

        times = output.metrics
        events = [
            (name, unix_ns(at))
            for name, at in (
                ("first scheduled", times.first_scheduled_time),
                ("first token", times.first_token_time),
            )
            if at is not None
        ]
        reasons = [sample.finish_reason or "none" for sample in output.outputs]
        attributes: dict[str, Any] = {
            "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.output_tokens": sum(len(sample.token_ids) for sample in output.outputs),
            "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
            "gen_ai.response.finish_reasons": reasons,
            "tidemill.num_preemptions": times.num_preemptions,
        }
        if times.first_token_time is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = times.first_token_time - times.arrival_time
        end = time.time_ns() if times.finished_time is None else unix_ns(times.finished_time)
        error = "timeout" if "timeout" in reasons else None
        self._end(output.request_id, unix_ns(times.arrival_time), end, attributes, events, error)

    def on_aborted(self, request_id: str) -> None:
        begun = self._running.get(request_id)
        attributes = {"gen_ai.response.finish_reasons": ["abort"]}
        if begun is not None:
            attributes["gen_ai.usage.input_tokens"] = begun[1]  # type: ignore[assignment]
        now = time.time_ns()
        self._end(request_id, now if begun is None else begun[0], now, attributes, [], None)

    def close(self) -> None:
        """Send what has not been sent, and stop."""
        self._provider.shutdown()

    def _end(
        self,
        request_id: str,
        start: int,
        end: int,
        attributes: Mapping[str, Any],
        events: list[tuple[str, int]],
        error: str | None,
    ) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        caller = self._callers.pop(request_id, None)
        context, operation = caller or (None, "text_completion")  # no context: the one that is current here
        begun = self._running.pop(request_id, None)
        model = self._model_name
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=context,
            kind=SpanKind.INTERNAL if caller is None else SpanKind.SERVER,
            start_time=start,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "tidemill",
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.response.id": request_id,
                **(_sampling_attributes(begun[2]) if begun is not None else {}),
                **attributes,
            },
        )
        for name, at in events:
            span.add_event(name, timestamp=at)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=max(start, end))


def _sampling_attributes(sampling: SamplingParams) -> dict[str, Any]:
    """What the conventions name of a request's parameters; those that are off are left out."""
    named: dict[str, Any] = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p),
        "gen_ai.request.frequency_penalty": float(sampling.frequency_penalty),
        "gen_ai.request.presence_penalty": float(sampling.presence_penalty),
    }
    if sampling.top_k:
        named["gen_ai.request.top_k"] = float(sampling.top_k)
    if sampling.n != 1:
        named["gen_ai.request.choice.count"] = sampling.n
    if sampling.seed is not None:
        named["gen_ai.request.seed"] = sampling.seed
    if sampling.stop:
        named["gen_ai.request.stop_sequences"] = list(sampling.stop)
    return named


def _exporter(name: str) -> Any:
    """The exporter of an OTEL_TRACES_EXPORTER value, which reads the other variables itself; None for none.

    Found as OpenTelemetry's own set-up finds them: by the entry points that packages declare.
    """
    if name in ("none", ""):
        return None
    if name == "otlp":
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
        )
        if protocol not in _EXPORTERS:
            raise ConfigError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: choose one of {', '.join(_EXPORTERS)}"
            )
        name = _EXPORTERS[protocol]
    found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
    if not found and name == _EXPORTERS["http/protobuf"]:
        raise MissingExtraError("opentelemetry-exporter-otlp-proto-http", "otel", "sending traces")
    if not found:
        raise ConfigError(
            f"no installed package has the trace exporter {name!r}: set OTEL_TRACES_EXPORTER to otlp (over "
            "http/protobuf), console or none, or install the one it names"
        )
    return found[0].load()()
