"""What an endpoint measures of itself, in Prometheus' text format.

Names and labels are those of vLLM's server, so that dashboards and alerts made for it show this one too; what it has no
name for is called `ganymede:...`. What concerns requests is measured in the ingress, which all of them pass; the gauges
of the engines are asked of every replica when they are scraped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.calls import LoadReport, ServedModel, fingerprint

_VERSION = ("model_name", "version")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """The counters of one endpoint, which serves `models` and their adapters; all by the name that was asked for."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self._gauges: list[Gauge] = []
        """Of replicas' reports."""
        self._known = [
            (each.name, version.digest, version.ref)
            for model in models
            for each in (model, *model.adapters)
            for version in each.versions
        ]
        self._refs = {digest: ref for _, digest, ref in self._known}
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From the request to the first token of a streamed answer.", _SECONDS
        )
        self._between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds", "From one token of a streamed answer to the next.", _TOKEN_SECONDS
        )
        self._latency = self._histogram(
            "vllm:e2e_request_latency_seconds", "From the request to the end of its answer.", _SECONDS
        )
        self._prompt_length = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._answer_length = self._histogram(
            "vllm:request_generation_tokens", "Tokens written for a request.", _TOKENS
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of answered requests.")
        self._answer_tokens = self._counter("vllm:generation_tokens", "Tokens written.")
        self._finished = self._counter("vllm:request_success", "Answers, by why they ended.", "finished_reason")
        self._responses = Counter(
            "http_requests", "Responses.", ("handler", "method", "status"), registry=self._registry
        )
        self._replays = self._total("ganymede:replays", "Times a call went on in another replica.")
        self._broken = self._total("ganymede:broken_answers", "Answers that broke off, or whose client went away.")
        self._fallbacks = self._total(
            "ganymede:canary_fallbacks", "Requests that the stable version answered as no canary could be asked."
        )
        self._running = self._gauge("vllm:num_requests_running", "Requests whose answers are being written.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that have no token yet.")
        self._waiting_tokens = self._gauge("ganymede:num_tokens_waiting", "Prompt tokens of requests without a token.")
        self._cache = self._gauge("vllm:kv_cache_usage_perc", "Share of the keys and values that are held; 1 is full.")
        self._speed = self._gauge("ganymede:prompt_tokens_per_second", "Measured speed of reading prompts.")
        self._adapters = self._gauge("ganymede:adapters_held", "Adapters that a replica holds.")
        self._loads = self._gauge("ganymede:adapter_loads", "Adapters loaded since the replica started.")
        self._replicas = self._gauge("ganymede:replicas", "Engine replicas that answer.", engine=False)

    def responded(self, route: str, method: str, status: int) -> None:
        """A response has begun."""
        self._responses.labels(route, method, str(status)).inc()

    def first_token(self, model: str, digest: str, seconds: float) -> None:
        """A streamed answer's first token is there."""
        self._first_token.labels(*self._labels(model, digest)).observe(seconds)

    def next_token(self, model: str, digest: str, seconds: float) -> None:
        """One more token of a stream has come after some time."""
        self._between_tokens.labels(*self._labels(model, digest)).observe(seconds)

    def answered(
        self, model: str, digest: str, seconds: float, prompt_tokens: int, answer_tokens: int, reasons: Sequence[str]
    ) -> None:
        """A request has been answered to its end."""
        labels = self._labels(model, digest)
        self._latency.labels(*labels).observe(seconds)
        self._prompt_length.labels(*labels).observe(prompt_tokens)
        self._prompt_tokens.labels(*labels).inc(prompt_tokens)
        for reason in reasons:
            self._finished.labels(*labels, reason).inc()
        if reasons:
            self._answer_length.labels(*labels).observe(answer_tokens)

    def wrote(self, model: str, digest: str, tokens: int) -> None:
        """Tokens of one request, answered or not."""
        self._answer_tokens.labels(*self._labels(model, digest)).inc(tokens)

    def broke(self, model: str) -> None:
        """A stream ended early."""
        self._broken.labels(model).inc()

    def replayed(self, model: str) -> None:
        """A call goes on in another replica."""
        self._replays.labels(model).inc()

    def fell_back(self, model: str) -> None:
        """The stable version answers in place of the canary."""
        self._fallbacks.labels(model).inc()

    def exposition(self, reports: Mapping[str, Mapping[str, Sequence[LoadReport]]]) -> bytes:
        """Everything, with the gauges of the replicas' reports, by model and by the digest of their version."""
        for gauge in self._gauges:
            gauge.clear()
        every = ((name, digest, those) for name, found in reports.items() for digest, those in found.items())
        for name, digest, those in every:
            self._replicas.labels(*self._labels(name, digest)).set(len(those))
            for index, report in enumerate(those):
                labels = (*self._labels(name, digest), str(index))
                self._running.labels(*labels).set(report.running)
                self._waiting.labels(*labels).set(report.waiting)
                self._waiting_tokens.labels(*labels).set(report.waiting_tokens)
                self._cache.labels(*labels).set(report.running_tokens / max(1, report.capacity_tokens))
                self._speed.labels(*labels).set(report.prompt_tokens_per_second)
                self._adapters.labels(*labels).set(report.adapters)
                self._loads.labels(*labels).set(report.adapter_loads)
        return generate_latest(self._registry)

    def _labels(self, model: str, digest: str) -> tuple[str, str]:
        """Model and version; during an update a replica may still hold one that is not known here."""
        return model, self._refs.get(digest) or fingerprint(digest)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, _VERSION, registry=self._registry, buckets=buckets)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, (*_VERSION, *labels), registry=self._registry)
        if not labels:
            for name, _, ref in self._known:
                counter.labels(name, ref)  # shown as 0 before it first counts
        return counter

    def _total(self, name: str, text: str) -> Counter:
        """Of all versions."""
        counter = Counter(name, text, ("model_name",), registry=self._registry)
        for model, _, _ in self._known:
            counter.labels(model)
        return counter

    def _gauge(self, name: str, text: str, *, engine: bool = True) -> Gauge:
        gauge = Gauge(name, text, (*_VERSION, "engine") if engine else _VERSION, registry=self._registry)
        self._gauges.append(gauge)
        return gauge
