"""The ingress: HTTP in, calls to engine replicas out. Imports no torch, so it starts in the time that Ray takes.

A call whose client goes away is cancelled in the replica, whether it was being streamed or not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from configs.schema.serving import ServingConfig
from serving.calls import (
    RETRY_AFTER_SECONDS,
    Call,
    Piece,
    Prompt,
    Refusal,
    ReplicaStatus,
    ServedModel,
    Tokens,
)
from serving.openai.routes import create_api

GONE = Refusal(
    503,
    "the engine replica went away; another one is started",
    "replica_unavailable",
    retry_after_seconds=RETRY_AFTER_SECONDS,
)
_UNAVAILABLE = (RayActorError, BackPressureError, DeploymentUnavailableError)


class RemoteEngine:
    """A handle to the engine replicas, as a `Generator`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        # Whole answers go this way too: Ray Serve does not hand the end of a unary call down to the replica.
        self._streaming = handle.options(stream=True)

    async def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The answers in batches; closing the iterator, or cancelling its reader, cancels the call in the replica."""
        response = self._streaming.stream.remote(call)
        try:
            async for batch in response:
                yield batch
        except _UNAVAILABLE:
            yield GONE
        finally:
            response.cancel()

    async def tokenize(self, prompt: Prompt) -> Tokens | Refusal:
        """The token ids that a text or a conversation becomes."""
        try:
            return await self._handle.tokenize.remote(prompt)
        except _UNAVAILABLE:
            return GONE

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Refusal:
        """The text of token ids, special tokens left out."""
        try:
            return await self._handle.detokenize.remote(token_ids)
        except _UNAVAILABLE:
            return GONE

    async def status(self) -> ReplicaStatus:
        """How one of the replicas is; waits while there is none."""
        return await self._handle.status.remote()


class Ingress:
    """The HTTP side of the endpoint; a Ray Serve deployment wraps it."""

    def __init__(self, engine: DeploymentHandle, model: ServedModel, config: ServingConfig) -> None:
        self._api = create_api(RemoteEngine(engine), model, config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve in the replica."""
        return self._api
