"""The OpenAPI document of the endpoint, from the models that bodies are read with: `GET /openapi.json`."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.openai import answers
from serving.openai.reading import ClassifyRequest, EmbeddingsRequest, NerRequest, ScoreRequest
from serving.openai.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_POSTS: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "/v1/completions": (CompletionRequest, answers.Completion),
    "/v1/chat/completions": (ChatRequest, answers.ChatCompletion),
    "/v1/embeddings": (EmbeddingsRequest, answers.Embeddings),
    "/v1/classify": (ClassifyRequest, answers.Classes),
    "/v1/ner": (NerRequest, answers.Entities),
    "/v1/score": (ScoreRequest, answers.Scores),
    "/tokenize": (TokenizeRequest, answers.TokenIds),
    "/detokenize": (DetokenizeRequest, answers.PromptText),
}
"""What each route reads and answers."""
_STREAMING = ("/v1/completions", "/v1/chat/completions")
_GETS: dict[str, type[BaseModel]] = {
    "/live": answers.Status,
    "/health": answers.Status,
    "/v1/models": answers.ModelList,
    "/v1/models/{name}": answers.ModelEntry,
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


@cache
def document(models: tuple[str, ...]) -> dict[str, Any]:
    """The document of an endpoint with models of these names. It has all routes: one that a model does not answer
    refuses with a 400 that says so.
    """
    kinds: set[type[BaseModel]] = {*_GETS.values(), answers.Error, *(kind for pair in _POSTS.values() for kind in pair)}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    refs, schemas = models_json_schema(
        [(kind, "validation") for kind in ordered], ref_template="#/components/schemas/{model}"
    )
    for asked, _ in _POSTS.values():
        schemas["$defs"][asked.__name__]["properties"]["model"] = {"type": "string", "enum": list(models)}
    named = {kind: refs[kind, "validation"] for kind in ordered}
    failed = {"default": _response("Refused; the error names the field at fault.", _json(named[answers.Error]))}
    paths: dict[str, Any] = {}
    for path, (asked, answered) in _POSTS.items():
        content = _json(named[answered])
        if path in _STREAMING:
            content |= {"text/event-stream": {"schema": {"type": "string"}}}
        body = {"required": True, "content": _json(named[asked])}
        paths[path] = {"post": {"requestBody": body, "responses": {"200": _response("The answer.", content), **failed}}}
    for path, answered in _GETS.items():
        found = {"200": _response("As it is.", _json(named[answered])), **failed}
        if answered is answers.Status:
            found["503"] = _response("It cannot be asked now.", _json(named[answered]))
        paths[path] = {"get": {"parameters": [_NAME] if "{name}" in path else [], "responses": found}}
    metrics = _response("Prometheus' text format.", {"text/plain": {"schema": {"type": "string"}}})
    paths["/metrics"] = {"get": {"responses": {"200": metrics, **failed}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Ganymede", "version": "1", "description": "OpenAI's API, and what it has no routes for."},
        "paths": paths,
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _response(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": content}
