"""The routes of the endpoint, over anything that generates.

`/v1/models`, `/v1/models/{name}`, `/v1/completions`, `/v1/chat/completions`, `/tokenize`, `/detokenize`, `/health`.
Bodies are read by hand, up to a limit, so that everything wrong with one (its size, its JSON, a field) is told in the
same shape.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from configs.schema.serving import ServingConfig
from serving.calls import Generator, Refusal, ReplicaStatus, ServedModel
from serving.openai.schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    error_body,
    read_request,
)
from serving.openai.stream import Answer, ChatAnswer, CompletionAnswer, server_sent_events

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

HEALTH_TIMEOUT_SECONDS = 5.0
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_api(engine: Generator, model: ServedModel, config: ServingConfig) -> FastAPI:
    """The ASGI application. `engine` is asked once a request."""
    api = FastAPI(title="Ganymede", docs_url=None, redoc_url=None, openapi_url=None)
    routes = _Routes(engine, model, config)
    api.add_api_route("/health", routes.health, methods=["GET"], response_model=None)
    api.add_api_route("/v1/models", routes.models, methods=["GET"], response_model=None)
    api.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"], response_model=None)
    api.add_api_route("/v1/completions", routes.completions, methods=["POST"], response_model=None)
    api.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], response_model=None)
    api.add_api_route("/tokenize", routes.tokenize, methods=["POST"], response_model=None)
    api.add_api_route("/detokenize", routes.detokenize, methods=["POST"], response_model=None)
    api.add_exception_handler(ApiError, _refused)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _crashed)
    return api


class _Routes:
    """One method a route."""

    def __init__(self, engine: Generator, model: ServedModel, config: ServingConfig) -> None:
        self._engine = engine
        self._model = model
        self._config = config

    async def health(self) -> Response:
        """200 once a replica has the model loaded and its engine takes steps; 503 before and when it has stopped."""
        try:
            status = await asyncio.wait_for(self._engine.status(), HEALTH_TIMEOUT_SECONDS)
        except TimeoutError:
            return JSONResponse({"status": "starting", "model": self._model.name}, 503)
        if not status.healthy:
            return JSONResponse({"status": "stopped", "model": self._model.name}, 503)
        return JSONResponse({"status": "ok", "model": self._model.name, "digest": status.digest})

    async def models(self) -> Response:
        """All models: the one that is served."""
        return JSONResponse({"object": "list", "data": [_describe(self._model, None)]})

    async def model(self, name: str) -> Response:
        """What is known of one model: its artifact, its version in the registry, what it can do."""
        self._require(name)
        return JSONResponse(_describe(self._model, await self._engine.status()))

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        asked = read_request(CompletionRequest, await self._body(request))
        return await self._answer(CompletionAnswer, "cmpl", asked)

    async def chat(self, request: Request) -> Response:
        """Continues a conversation."""
        asked = read_request(ChatRequest, await self._body(request))
        return await self._answer(ChatAnswer, "chatcmpl", asked)

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text or a conversation."""
        asked = read_request(TokenizeRequest, await self._body(request))
        self._require(asked.model)
        tokens = _accepted(await self._engine.tokenize(asked.what()))
        return JSONResponse({"tokens": tokens.ids, "count": len(tokens.ids), "max_model_len": tokens.context_length})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        asked = read_request(DetokenizeRequest, await self._body(request))
        self._require(asked.model)
        return JSONResponse({"prompt": _accepted(await self._engine.detokenize(asked.tokens))})

    async def _answer(self, kind: type[Answer], prefix: str, asked: CompletionRequest | ChatRequest) -> Response:
        self._require(asked.model)
        call = asked.call(f"{prefix}-{uuid.uuid4().hex}")
        frame = kind(call.id, int(time.time()), asked.model, self._model.fingerprint, asked.n)
        batches = self._engine.stream(call)
        # The status line waits for the first batch, so that a refusal is an HTTP error and not an event.
        first = await anext(batches)
        if isinstance(first, Refusal):
            raise ApiError(asked.named(first))
        if call.whole:
            await batches.aclose()
            return JSONResponse(frame.whole(first))
        body = server_sent_events(frame, first, batches, include_usage=asked.include_usage)
        return StreamingResponse(body, media_type="text/event-stream", headers=SSE_HEADERS)

    async def _body(self, request: Request) -> bytes:
        """The request's body. Raises `ApiError` (413) as soon as it is known to be too long."""
        limit = self._config.max_body_bytes
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise ApiError(
                    Refusal(413, f"the body is too long; allowed: at most {limit} bytes", "request_too_large")
                )
        return bytes(body)

    def _require(self, name: str) -> None:
        if name != self._model.name:
            message = f"the model {name!r} is not served here; allowed: {self._model.name!r}"
            raise ApiError(Refusal(404, message, "model_not_found", "model"))


def _accepted(result: T | Refusal) -> T:
    if isinstance(result, Refusal):
        raise ApiError(result)
    return result


def _describe(model: ServedModel, status: ReplicaStatus | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": model.name, "object": "model", "created": model.created, "owned_by": "ganymede"}
    if status is None:
        return entry
    return {
        **entry,
        "artifact": model.ref,
        "digest": model.digest,
        "registry_version": model.version,
        "alias": model.alias,
        "system_fingerprint": model.fingerprint,
        "context_length": status.context_length,
        "chat": status.chat,
    }


def _error_response(refusal: Refusal) -> Response:
    wait = refusal.retry_after_seconds
    headers = None if wait is None else {"Retry-After": str(wait)}
    return JSONResponse(error_body(refusal), refusal.status, headers=headers)


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return _error_response(error.refusal)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    if not isinstance(error, HTTPException):
        raise error
    message = f"{error.detail}: {request.method} {request.url.path}"
    return _error_response(Refusal(error.status_code, message, "unknown_route"))


async def _crashed(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error_response(Refusal(500, "the server met an error; its log has the details", "internal_error"))
