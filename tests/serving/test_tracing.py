"""Traces, as a collector on loopback gets them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from infra.platform import free_ports
from serving.data_plane import environment
from serving.tracing import Tracing
from tests.serving.conftest import local_endpoint

CALLER, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "a secret question", "max_tokens": 8, "temperature": 0}
PHASES = ["ingress", "route", "queue", "prefill", "decode", "flush"]


class Collector(BaseHTTPRequestHandler):
    bodies: list[bytes] = []  # noqa: RUF012 - one collector a test run
    headers_seen: list[dict[str, str]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.end_headers()
        Collector.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        Collector.bodies.append(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def http(collector: str, model_folder: Path) -> Iterator[httpx.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"{collector}/")
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc,x-tenant=a")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with local_endpoint(model_folder) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client


def spans_of(trace_id: str) -> list[Any]:
    """All spans of a trace, once its root is there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        requests = [ExportTraceServiceRequest.FromString(body) for body in Collector.bodies]
        scopes = (scope for request in requests for each in request.resource_spans for scope in each.scope_spans)
        found = [span for scope in scopes for span in scope.spans if span.trace_id.hex() == trace_id]
        if any(span.kind == span.SPAN_KIND_SERVER for span in found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no root of {trace_id}")


def attributes(span: Any) -> dict[str, Any]:
    def value(of: Any) -> Any:
        kind = of.WhichOneof("value")
        return [value(each) for each in of.array_value.values] if kind == "array_value" else getattr(of, kind)

    return {pair.key: value(pair.value) for pair in span.attributes}


def calling(number: int, *, sampled: bool = True) -> tuple[str, dict[str, str]]:
    trace_id = f"{CALLER[:-2]}{number:02x}"
    return trace_id, {"traceparent": f"00-{trace_id}-{PARENT}-{'01' if sampled else '00'}"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_of_its_caller_and_its_phases_are_below_it(http: httpx.Client, stream: bool) -> None:
    trace_id, headers = calling(int(stream))
    answer = http.post("/v1/completions", json={**BODY, "stream": stream}, headers=headers)
    assert answer.status_code == 200
    assert "server-timing" not in answer.headers
    assert b"timing_ms" not in answer.content
    (root,) = (span for span in spans_of(trace_id) if span.kind == span.SPAN_KIND_SERVER)
    phases = [span for span in spans_of(trace_id) if span is not root and span.kind != span.SPAN_KIND_SERVER]
    assert (root.name, root.parent_span_id.hex()) == ("POST /v1/completions", PARENT)
    said = attributes(root)
    assert (said["http.response.status_code"], said["gen_ai.request.model"], said["outcome"]) == (
        200,
        "tiny",
        "answered",
    )
    assert (said["gen_ai.usage.output_tokens"], said["gen_ai.response.finish_reasons"]) == (8, ["length"])
    assert said["ganymede.version"] == "fp_" + "ab" * 8
    assert [span.name for span in phases] == PHASES
    assert {span.parent_span_id for span in phases} == {root.span_id}
    ends = [root.start_time_unix_nano, *(span.end_time_unix_nano for span in phases)]
    assert [span.start_time_unix_nano for span in phases] == ends[:-1]
    assert ends == sorted(ends)
    assert root.end_time_unix_nano >= ends[-1]


def test_reading_is_traced_too_and_refusals_have_no_phases(http: httpx.Client) -> None:
    trace_id, headers = calling(20)
    assert http.post("/v1/completions", json={**BODY, "model": "none"}, headers=headers).status_code == 404
    (root,) = spans_of(trace_id)
    said = attributes(root)
    assert (said["http.response.status_code"], said["outcome"], "gen_ai.request.model" in said) == (
        404,
        "refused",
        False,
    )
    trace_id, headers = calling(21)
    assert http.get("/no/such/place", headers=headers).status_code == 404
    assert [span.name for span in spans_of(trace_id)] == ["GET unknown"]


def test_a_caller_that_is_not_sampled_is_not_traced(http: httpx.Client) -> None:
    silent, headers = calling(30, sampled=False)
    http.post("/v1/completions", json=BODY, headers=headers)
    later, headers = calling(31)
    http.post("/v1/completions", json=BODY, headers=headers)
    spans_of(later)
    assert bytes.fromhex(silent) not in b"".join(Collector.bodies)


def test_spans_hold_no_text_and_go_where_the_environment_says(http: httpx.Client) -> None:
    trace_id, headers = calling(40)
    answer = http.post("/v1/completions", json={**BODY, "max_tokens": 40}, headers=headers).json()
    spans_of(trace_id)
    sent = b"".join(Collector.bodies)
    assert b"secret" not in sent
    assert answer["choices"][0]["text"][:12].encode() not in sent
    (seen,) = {(h["authorization"], h["x-tenant"], h["content-type"]) for h in Collector.headers_seen}
    assert seen == ("Bearer abc", "a", "application/x-protobuf")
    resource = ExportTraceServiceRequest.FromString(Collector.bodies[0]).resource_spans[0].resource
    assert attributes(resource).items() >= {("service.name", "ganymede"), ("deployment.environment", "test")}


def test_without_a_collector_there_are_no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert Tracing.from_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert Tracing.from_environment() is not None
    assert environment("python", "127.0.0.1", ())["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://127.0.0.1:4318"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert Tracing.from_environment() is None


def test_a_collector_that_is_away_costs_no_request(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with local_endpoint(model_folder) as url:
        for _ in range(3):
            assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 200
            time.sleep(0.05)
