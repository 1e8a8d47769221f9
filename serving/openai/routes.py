"""The routes of the endpoint, over anything that answers calls.

`/v1/models`, `/v1/models/{name}`, `/v1/completions`, `/v1/chat/completions`, `/v1/embeddings`, `/v1/classify`,
`/v1/ner`, `/v1/score`, `/tokenize`, `/detokenize`, `/live`, `/health`, `/metrics`, `/openapi.json`. All are there
whatever the model can do: the replica refuses, and says what it can. Bodies are read by hand, up to a limit, so that
everything wrong with one (its size, its JSON, a field) is told in the same shape.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from configs.errors import ConfigError
from configs.schema.serving import ApiKey, ServingConfig
from serving.access import AccessLog, Observed, Trace
from serving.calls import Refusal, ReplicaStatus, ServedModel, fingerprint
from serving.catalogue import Catalogue, Entry
from serving.keys import Keyed, KeyRing
from serving.metrics import CONTENT_TYPE, Metrics
from serving.openai.body import read_request, short
from serving.openai.document import document
from serving.openai.errors import ApiError, error_response
from serving.openai.reading import (
    ClassifyRequest,
    EmbeddingsRequest,
    NerRequest,
    ReadRequest,
    ScoreRequest,
    read_answer,
)
from serving.openai.resume import HEADER, EventId, begin, digest_of
from serving.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from serving.openai.stream import Answer, ChatAnswer, CompletionAnswer, server_sent_events
from serving.timing import Waterfall, server_timing
from serving.tracing import Tracing

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

TIMING_HEADER = "Server-Timing"
_GOOD = ("ok", "asleep")
_BAD = ("ok", "asleep", "starting", "stopped")
"""States of a model, the worst last."""
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_api(catalogue: Catalogue, config: ServingConfig, metrics: Metrics) -> FastAPI:
    """The ASGI application over the models of a catalogue.

    Raises `ConfigError` if it is to ask for keys and has no file with them.
    """
    api = FastAPI(title="Ganymede", docs_url=None, redoc_url=None, openapi_url=None)
    routes = _Routes(catalogue, config, metrics)
    # The last one added is the outermost: refused keys are logged too.
    if config.keys_required:
        if config.keys_path is None:
            raise ConfigError("keys are required, and keys_path does not say where they are", allowed="a file")
        api.add_middleware(Keyed, ring=KeyRing(config.keys_path))
    api.add_middleware(Observed, metrics=metrics, log=AccessLog(config.access_log), tracing=Tracing.from_environment())
    api.add_api_route("/live", routes.live, methods=["GET"], response_model=None)
    api.add_api_route("/openapi.json", routes.document, methods=["GET"], response_model=None)
    api.add_api_route("/metrics", routes.metrics, methods=["GET"], response_model=None)
    api.add_api_route("/health", routes.health, methods=["GET"], response_model=None)
    api.add_api_route("/v1/models", routes.models, methods=["GET"], response_model=None)
    api.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"], response_model=None)
    api.add_api_route("/v1/completions", routes.completions, methods=["POST"], response_model=None)
    api.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], response_model=None)
    api.add_api_route("/v1/embeddings", routes.embeddings, methods=["POST"], response_model=None)
    api.add_api_route("/v1/classify", routes.classify, methods=["POST"], response_model=None)
    api.add_api_route("/v1/ner", routes.ner, methods=["POST"], response_model=None)
    api.add_api_route("/v1/score", routes.score, methods=["POST"], response_model=None)
    api.add_api_route("/tokenize", routes.tokenize, methods=["POST"], response_model=None)
    api.add_api_route("/detokenize", routes.detokenize, methods=["POST"], response_model=None)
    api.add_exception_handler(ApiError, _refused)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _crashed)
    return api


class _Routes:
    """One method a route."""

    def __init__(self, catalogue: Catalogue, config: ServingConfig, metrics: Metrics) -> None:
        self._catalogue = catalogue
        self._config = config
        self._metrics = metrics

    async def live(self) -> Response:
        """200 as long as the ingress itself runs; whether a model can be asked is what `/health` says."""
        return JSONResponse({"status": "ok"})

    async def document(self) -> Response:
        """The OpenAPI document."""
        return JSONResponse(document(tuple(self._catalogue)))

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        found = await asyncio.gather(*(entry.backend.reports() for entry in self._catalogue.values()))
        reports = dict(zip(self._catalogue, found, strict=True))
        return Response(self._metrics.exposition(reports), media_type=CONTENT_TYPE)

    async def health(self, request: Request) -> Response:
        """200 once each model has a replica that has it loaded and whose engine takes steps; 503 before and when one
        has stopped. With `?model=NAME`, of that one alone.

        200 too while no replica of a model runs as there is nothing to do; with `?wake` one is started then.
        """
        only, wake = request.query_params.get("model"), "wake" in request.query_params
        models = {name: entry for name, entry in self._catalogue.items() if entry.model.parent is None}
        if only is not None and only not in models:
            raise ApiError(_not_served(only, models))
        asked = models if only is None else {only: models[only]}
        found = await asyncio.gather(*(_health(entry, wake=wake) for entry in asked.values()))
        worst = max((each["status"] for each in found), key=_BAD.index)
        body = {"status": worst, "models": dict(zip(asked, found, strict=True))}
        return JSONResponse(body, 200 if worst in _GOOD else 503)

    async def models(self, request: Request) -> Response:
        """All models that the key may ask."""
        allowed = [entry.model for name, entry in self._catalogue.items() if _may_ask(request, name)]
        return JSONResponse({"object": "list", "data": [_listed(model) for model in allowed]})

    async def model(self, request: Request, name: str) -> Response:
        """What is known of one model: its artifact, its version in the registry, what it can do."""
        found = self._entry(request, name)
        model, settings = found.model, found.settings
        statuses = await found.backend.statuses()
        entry = _describe(model, _accepted(statuses[model.digest]))
        if model.adapters:
            entry["adapters"] = [each.name for each in model.adapters]
        if model.canary is not None and settings.canary is not None:
            canary = _describe(model.canary, statuses[model.canary.digest])
            entry["canary"] = {**canary, "weight": settings.canary.weight}
        return JSONResponse(entry)

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        asked = read_request(CompletionRequest, await self._body(request))
        return await self._answer(CompletionAnswer, "cmpl", asked, request)

    async def chat(self, request: Request) -> Response:
        """Continues a conversation."""
        asked = read_request(ChatRequest, await self._body(request))
        return await self._answer(ChatAnswer, "chatcmpl", asked, request)

    async def embeddings(self, request: Request) -> Response:
        """Texts as vectors."""
        return await self._read("embd", read_request(EmbeddingsRequest, await self._body(request)), request)

    async def classify(self, request: Request) -> Response:
        """Which class texts are of."""
        return await self._read("clas", read_request(ClassifyRequest, await self._body(request)), request)

    async def ner(self, request: Request) -> Response:
        """The entities in texts."""
        return await self._read("ner", read_request(NerRequest, await self._body(request)), request)

    async def score(self, request: Request) -> Response:
        """How well pairs of texts go together."""
        return await self._read("score", read_request(ScoreRequest, await self._body(request)), request)

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text or a conversation."""
        asked = read_request(TokenizeRequest, await self._body(request))
        entry = self._entry(request, asked.model)
        tokens = _accepted(await entry.backend.tokenize(asked.what()))
        return JSONResponse({"tokens": tokens.ids, "count": len(tokens.ids), "max_model_len": tokens.context_length})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        asked = read_request(DetokenizeRequest, await self._body(request))
        entry = self._entry(request, asked.model)
        return JSONResponse({"prompt": _accepted(await entry.backend.detokenize(asked.tokens))})

    async def _read(self, prefix: str, asked: ReadRequest, request: Request) -> Response:
        entry = self._entry(request, asked.model)
        trace: Trace = request.scope["trace"]
        trace.request_id = f"{prefix}-{uuid.uuid4().hex}"
        call = replace(asked.call(trace.request_id), asker=_asker(asked, entry.model))
        trace.waterfall = waterfall = Waterfall(trace.began, trace.proxy_seconds)
        readings = await entry.backend.read(call)
        if isinstance(readings, Refusal):
            raise ApiError(asked.named(readings))
        trace.digest = readings.model_digest
        trace.count(readings.prompt_tokens, 0)
        answer = JSONResponse(read_answer(asked, call.id, int(time.time()), readings))
        waterfall.note([(0, readings.spent)])
        if asked.return_timing:
            answer.headers[TIMING_HEADER] = server_timing(waterfall.whole)
        return answer

    async def _answer(
        self, kind: type[Answer], prefix: str, asked: CompletionRequest | ChatRequest, request: Request
    ) -> Response:
        entry = self._entry(request, asked.model)
        trace: Trace = request.scope["trace"]
        event_id = _last_event_id(asked, request)
        trace.stream = asked.stream
        trace.request_id = f"{prefix}-{uuid.uuid4().hex}" if event_id is None else event_id.source.call_id
        call = replace(asked.call(trace.request_id), asker=_asker(asked, entry.model))
        if event_id is not None:
            call = _accepted(event_id.again(asked, call, entry.model))
        if asked.return_timing or trace.traced:
            call = replace(call, report_timing=True)
            trace.waterfall = Waterfall(trace.began, trace.proxy_seconds)
        waterfall = trace.waterfall if asked.return_timing else None
        batches = trace.follow(entry.backend.stream(call), self._metrics, asked.n)
        begun = await begin(batches, asked, call, event_id)
        if isinstance(begun, Refusal):
            await batches.aclose()
            raise ApiError(asked.named(begun))
        source = begun.cursor.source
        functions = () if call.tool_use is None else tuple(each.name for each in call.tool_use.functions)
        frame = kind(source.call_id, source.created, asked.model, source.fingerprint, asked.n, functions=functions)
        if call.whole:
            await batches.aclose()
            answer: Response = JSONResponse(frame.whole(begun.first))
        else:
            body = server_sent_events(frame, begun, batches, include_usage=asked.include_usage, waterfall=waterfall)
            answer = StreamingResponse(body, media_type="text/event-stream", headers=SSE_HEADERS)
        if waterfall is not None:
            answer.headers[TIMING_HEADER] = server_timing(
                waterfall.whole if call.whole else waterfall.until_first_token
            )
        return answer

    async def _body(self, request: Request) -> bytes:
        """The request's body. Raises `ApiError`: 413 as soon as it is known to be too long, 408 if it is too slow."""
        limit = self._config.max_body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.body_limit_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        message = f"the body is too long; allowed: at most {limit} bytes"
                        raise ApiError(Refusal(413, message, "request_too_large"))
        except TimeoutError as error:
            message = f"the body did not arrive in {self._config.body_limit_seconds:g} s"
            raise ApiError(Refusal(408, message, "request_timeout")) from error
        return bytes(body)

    def _entry(self, request: Request, name: str) -> Entry:
        """Raises `ApiError` unless the model is served and the request's key may ask it."""
        entry = self._catalogue.get(name)
        if entry is None:
            raise ApiError(_not_served(name, [each for each in self._catalogue if _may_ask(request, each)]))
        if not _may_ask(request, name):
            message = f"this API key may not ask {name!r}; allowed: {', '.join(request.scope['key'].models)}"
            raise ApiError(Refusal(403, message, "model_not_allowed", "model"))
        request.scope["trace"].model = name
        return entry


def _not_served(name: str, served: Iterable[str]) -> Refusal:
    allowed = ", ".join(map(repr, served)) or "no model"
    message = f"the model {short(repr(name))} is not served here; allowed: {allowed}"
    return Refusal(404, message, "model_not_found", "model")


def _may_ask(request: Request, model: str) -> bool:
    key: ApiKey | None = request.scope.get("key")
    return key is None or not key.models or model in key.models


def _asker(asked: ReadRequest | CompletionRequest | ChatRequest, model: ServedModel) -> str:
    """What decides whether the canary answers, if there is one."""
    if model.canary is None:
        return ""
    return digest_of(asked) if asked.user is None else asked.user


def _last_event_id(asked: CompletionRequest | ChatRequest, request: Request) -> EventId | None:
    """The event that a stream is to go on from, if one is named. Raises `ApiError` if none can."""
    named = request.headers.get(HEADER)
    if named is None:
        return None
    if not asked.stream:
        raise ApiError.bad_request(f"{HEADER} is allowed only with stream: true", param=HEADER, code="invalid_value")
    return _accepted(EventId.parse(named))


def _accepted(result: T | Refusal) -> T:
    if isinstance(result, Refusal):
        raise ApiError(result)
    return result


def _listed(model: ServedModel) -> dict[str, Any]:
    """As OpenAI's list of models has it, and of an adapter the name of its base."""
    entry = {"id": model.name, "object": "model", "created": model.created, "owned_by": "ganymede"}
    return {**entry, "parent": model.parent}


def _describe(model: ServedModel, status: ReplicaStatus | Refusal) -> dict[str, Any]:
    """What is known of a version; without what it can do while no replica says that."""
    entry = {
        **_listed(model),
        "artifact": model.ref,
        "digest": model.digest if model.adapter is None else model.adapter.digest,
        "registry_version": model.version,
        "alias": model.alias,
        "system_fingerprint": fingerprint(model.digest),
        "lineage": asdict(model.lineage),
    }
    if isinstance(status, Refusal):
        return entry
    return {
        **entry,
        "context_length": status.context_length,
        "capabilities": status.capabilities,
        "labels": status.labels,
    }


async def _health(entry: Entry, *, wake: bool) -> dict[str, Any]:
    """How a model is, with its canary and the names of its adapters if it has any."""
    if entry.settings.replicas_min == 0 and not wake and await entry.backend.asleep():
        return {"status": "asleep"}
    found, *canary = map(_state, (await entry.backend.statuses()).values())
    adapters = [each.name for each in entry.model.adapters]
    return found | ({"canary": canary[0]} if canary else {}) | ({"adapters": adapters} if adapters else {})


def _state(status: ReplicaStatus | Refusal) -> dict[str, Any]:
    if isinstance(status, Refusal):
        return {"status": "starting" if status.code == "starting" else "stopped"}
    return {"status": "ok", "digest": status.digest} if status.healthy else {"status": "stopped"}


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error_response(error.refusal)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    if not isinstance(error, HTTPException):
        raise error
    message = f"{error.detail}: {request.method} {request.url.path}"
    return error_response(Refusal(error.status_code, message, "unknown_route"))


async def _crashed(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(Refusal(500, "the server met an error; its log has the details", "internal_error"))
