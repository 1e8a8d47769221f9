"""OpenTelemetry traces of requests, for whoever sets `OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`).

A request is one span of the ingress, below the caller's where it sends a W3C `traceparent`, and the phases of `timing`
are the spans below it. They hold names, sizes and durations; never what was asked or answered. The standard variables
apply (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_EXPORTER_OTLP_HEADERS`,
`OTEL_EXPORTER_OTLP_TIMEOUT`, `OTEL_BSP_...`, `OTEL_SDK_DISABLED`). Spans go to the collector as OTLP over HTTP, in
batches, from a thread of their own: a collector that is away costs spans, and no request.
"""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Span

    from serving.access import Trace

PREFIX = "OTEL_"
"""Of the variables that the ingress has to have as the command has them."""
_ENDPOINT, _TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_SECONDS = 10.0
"""A collector may take over a batch unless `OTEL_EXPORTER_OTLP_TIMEOUT` says otherwise."""

logger = logging.getLogger("ray.serve")


class Tracing:
    """Makes the spans of requests. Made by `from_environment`."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("ganymede")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls) -> Self | None:
        """None unless a collector is named."""
        endpoint = _endpoint(os.environ)
        if endpoint is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "ganymede"}
        provider = TracerProvider(resource=Resource.create(named))
        provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint, os.environ)))
        return cls(provider)

    def begin(self, method: str, headers: Mapping[str, str], began_ns: int) -> Span:
        """The span of a request that came at `began_ns`, nanoseconds since the epoch."""
        from opentelemetry.trace import SpanKind

        caller = self._propagator.extract(headers)
        span: Span = self._tracer.start_span(method, context=caller, kind=SpanKind.SERVER, start_time=began_ns)
        return span

    def end(self, span: Span, trace: Trace, began_ns: int, attributes: Mapping[str, Any]) -> None:
        """Ends a request's span, with those of its phases if there was an answer."""
        from opentelemetry.trace import set_span_in_context

        span.update_name(f"{attributes['http.request.method']} {attributes['http.route']}")
        span.set_attributes({key: value for key, value in attributes.items() if value not in (None, "", [])})
        if attributes["outcome"] == "broken" or attributes["http.response.status_code"] >= 500:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        at = began_ns
        if trace.waterfall is not None and trace.digest is not None:
            phases = trace.waterfall.whole
            del phases["total"]
            for name, milliseconds in phases.items():
                child = self._tracer.start_span(name, context=set_span_in_context(span), start_time=at)
                at += round(milliseconds * 1e6)
                child.end(at)
        span.end(max(at, began_ns + round(trace.seconds * 1e9)))

    def close(self) -> None:
        """Sends what there is."""
        self._provider.shutdown()


def _endpoint(environment: Mapping[str, str]) -> str | None:
    base = environment.get(_ENDPOINT)
    return environment.get(_TRACES_ENDPOINT) or (f"{base.rstrip('/')}/v1/traces" if base else None)


def _exporter(endpoint: str, environment: Mapping[str, str]) -> Any:
    """Sends spans as OTLP over HTTP."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    said = environment.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or environment.get("OTEL_EXPORTER_OTLP_HEADERS") or ""
    pairs = (part.partition("=") for part in said.split(",") if "=" in part)
    headers = {name.strip(): unquote(value.strip()) for name, _, value in pairs}
    headers["Content-Type"] = "application/x-protobuf"
    milliseconds = environment.get("OTEL_EXPORTER_OTLP_TIMEOUT")
    seconds = float(milliseconds) / 1000 if milliseconds else _SECONDS

    class Exporter(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            request = urllib.request.Request(endpoint, encoded(spans), headers)
            try:
                with urllib.request.urlopen(request, timeout=seconds):
                    return SpanExportResult.SUCCESS
            except OSError as error:
                logger.warning("%d spans are lost: %s does not take them: %s", len(spans), endpoint, error)
                return SpanExportResult.FAILURE

    return Exporter()


def encoded(spans: Sequence[ReadableSpan]) -> bytes:
    """An `ExportTraceServiceRequest` with these spans, which are of one resource."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1 import trace_pb2

    def value(of: Any) -> Any:
        if isinstance(of, bool):
            return AnyValue(bool_value=of)
        if isinstance(of, int):
            return AnyValue(int_value=of)
        if isinstance(of, float):
            return AnyValue(double_value=of)
        if isinstance(of, Sequence) and not isinstance(of, str):
            return AnyValue(array_value=ArrayValue(values=[value(each) for each in of]))
        return AnyValue(string_value=str(of))

    def pairs(attributes: Mapping[str, Any] | None) -> list[Any]:
        return [KeyValue(key=key, value=value(each)) for key, each in (attributes or {}).items()]

    def span_of(span: Any) -> Any:
        context, parent = span.get_span_context(), span.parent
        fields: dict[str, Any] = {
            "trace_id": context.trace_id.to_bytes(16),
            "span_id": context.span_id.to_bytes(8),
            "parent_span_id": b"" if parent is None else parent.span_id.to_bytes(8),
            "trace_state": context.trace_state.to_header(),
            "name": span.name,
            "kind": span.kind.value + 1,
            "start_time_unix_nano": span.start_time,
            "end_time_unix_nano": span.end_time,
            "attributes": pairs(span.attributes),
            "status": trace_pb2.Status(code=span.status.status_code.value),
        }
        return trace_pb2.Span(**fields)

    scope = trace_pb2.ScopeSpans(scope=InstrumentationScope(name="ganymede"), spans=[span_of(span) for span in spans])
    resource = Resource(attributes=pairs(spans[0].resource.attributes))
    return ExportTraceServiceRequest(
        resource_spans=[trace_pb2.ResourceSpans(resource=resource, scope_spans=[scope])]
    ).SerializeToString()
