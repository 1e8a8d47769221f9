"""The endpoint's middleware: one line a request in the access log, one count in the metrics. No prompt, no answer.

A line is a JSON object with `time` (UTC), `request_id`, `key` (the name of the API key), `method`, `path`, `model` (the
name that was asked for), `status`, `outcome`, `stream`, `version` (the answer's `system_fingerprint`), `prompt_tokens`,
`answer_tokens`, `first_token_seconds` and `seconds`. The outcome is `answered`, `refused`, `broken` (an error after the
first piece) or `left` (the client went away).
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from configs.schema.serving import ApiKey
from serving.calls import Piece, Refusal, Spent, fingerprint
from serving.metrics import Metrics
from serving.timing import Waterfall, proxy_seconds
from serving.tracing import Tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass
class Trace:
    """What is known of one request so far."""

    began: float = field(default_factory=time.perf_counter)
    request_id: str = ""
    model: str = ""
    """Name that was asked for, once it is known to be served."""
    key: ApiKey | None = None
    spend: Callable[[int], None] | None = None
    """Takes tokens from the key's budget."""
    stream: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0
    digest: str | None = None
    """Of the model version that answers; None before there is anything of it."""
    reasons: list[str] = field(default_factory=list)
    """Why its answers ended."""
    first_token_seconds: float | None = None
    broken: bool = False
    """An error came after the first piece."""
    proxy_seconds: float | None = None
    """That the request was in the proxy before, if that says so."""
    waterfall: Waterfall | None = None
    """Where its time goes, if that was asked for, by the client or for its span."""
    span: Span | None = None
    """Of the request, where a collector gets traces."""

    @property
    def traced(self) -> bool:
        """Whether the request has a span that a collector gets."""
        return self.span is not None and self.span.is_recording()

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self.began

    async def follow(
        self, batches: AsyncGenerator[Sequence[Piece] | Refusal, None], metrics: Metrics, choices: int
    ) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The batches of an answer, counted and timed on their way; closes them however it ends."""
        last: float | None = None
        prompts: dict[int, int] = {}
        async with aclosing(batches):
            async for batch in batches:
                if not isinstance(batch, Refusal):
                    if self.waterfall is not None:
                        self.waterfall.note((piece.index, piece.spent or Spent()) for piece in batch)
                    now = self.seconds
                    self.digest = next((piece.model_digest for piece in batch), self.digest)
                    if self.stream:
                        self._time(batch, now, last, metrics)
                    last = now
                    self.reasons += [piece.finish_reason for piece in batch if piece.finish_reason is not None]
                    prompts.update((piece.index // choices, piece.prompt_tokens) for piece in batch)
                    self.count(sum(prompts.values()), sum(len(piece.token_ids) for piece in batch))
                self.broken = isinstance(batch, Refusal) and last is not None
                yield batch

    def count(self, prompt_tokens: int, new_tokens: int) -> None:
        """Takes down the prompt tokens in all and the tokens that were written now."""
        if self.spend is not None:
            self.spend(prompt_tokens - self.prompt_tokens + new_tokens)
        self.prompt_tokens = prompt_tokens
        self.answer_tokens += new_tokens

    def _time(self, batch: Sequence[Piece], now: float, last: float | None, metrics: Metrics) -> None:
        if last is None:
            self.first_token_seconds = now
            metrics.first_token(self.model, self.digest or "", now)
            return
        # Answers to one request are written side by side: each of them waited this long.
        tokens = 1 if len(batch) == 1 else max(Counter(piece.index for piece in batch).values())
        for _ in range(tokens):
            metrics.next_token(self.model, self.digest or "", (now - last) / tokens)


class AccessLog:
    """Appends lines to a file, which may be moved away under it (as logrotate does); None writes nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._logger: logging.Logger | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._logger = logging.Logger("access", logging.INFO)
            self._logger.addHandler(WatchedFileHandler(path, encoding="utf-8"))

    def write(self, **fields: object) -> None:
        """One line."""
        if self._logger is not None:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._logger.info(json.dumps({"time": now, **fields}, ensure_ascii=False))


class Observed:
    """ASGI middleware: gives each request a `Trace` (`scope["trace"]`) and reports it once it has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: AccessLog, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._log = log
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on whatever the application raises."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        trace = scope["trace"] = Trace(proxy_seconds=proxy_seconds(headers.get("x-request-start", "")))
        began_ns = time.time_ns() - round((trace.proxy_seconds or 0.0) * 1e9)
        if self._tracing is not None:
            trace.span = self._tracing.begin(scope["method"], headers, began_ns)
        status, ended = 0, False

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status, trace.broken = 500, True
            raise
        finally:
            self._report(scope, trace, status, ended, began_ns)

    def _report(self, scope: Scope, trace: Trace, status: int, ended: bool, began_ns: int) -> None:
        route = scope.get("route")
        # Only the routes there are: whatever else is asked for would become a label of its own.
        path = "unknown" if route is None else route.path
        answered = ended and not trace.broken and 0 < status < 400
        outcome = "answered" if answered else "broken" if trace.broken else "refused" if ended else "left"
        self._metrics.responded(path, scope["method"], status)
        if trace.digest is not None:
            self._metrics.wrote(trace.model, trace.digest, trace.answer_tokens)
            if answered and trace.prompt_tokens:
                self._metrics.answered(
                    trace.model, trace.digest, trace.seconds, trace.prompt_tokens, trace.answer_tokens, trace.reasons
                )
        if trace.model and outcome in ("broken", "left"):
            self._metrics.broke(trace.model)
        if self._tracing is not None and trace.span is not None:
            attributes = {
                "http.request.method": scope["method"],
                "http.route": path,
                "http.response.status_code": status,
                "gen_ai.request.model": trace.model,
                "gen_ai.response.id": trace.request_id,
                "gen_ai.response.finish_reasons": trace.reasons,
                "gen_ai.usage.input_tokens": trace.prompt_tokens,
                "gen_ai.usage.output_tokens": trace.answer_tokens,
                "ganymede.version": None if trace.digest is None else fingerprint(trace.digest),
                "outcome": outcome,
            }
            self._tracing.end(trace.span, trace, began_ns, attributes)
        self._log.write(
            request_id=trace.request_id,
            key=None if trace.key is None else trace.key.name,
            method=scope["method"],
            path=path,
            model=trace.model or None,
            status=status,
            outcome=outcome,
            stream=trace.stream,
            version=None if trace.digest is None else fingerprint(trace.digest),
            prompt_tokens=trace.prompt_tokens,
            answer_tokens=trace.answer_tokens,
            first_token_seconds=_rounded(trace.first_token_seconds),
            seconds=_rounded(trace.seconds),
        )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
