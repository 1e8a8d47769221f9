"""The ingress: HTTP in, calls to engine replicas out. Imports no torch, so it starts in the time that Ray takes.

A call whose client goes away is cancelled in the replica, whether it was being streamed or not. A call whose replica
goes away goes on in another one from the tokens that were given out (`replay`): the client notices a pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc  # type: ignore[import-untyped]  # ships no types
from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from configs.errors import OverloadedError
from configs.schema.serving import ServingConfig
from serving.calls import (
    LOST,
    RETRY_AFTER_SECONDS,
    UNAVAILABLE,
    Call,
    LoadReport,
    Offer,
    Piece,
    Prompt,
    ReadCall,
    Readings,
    Refusal,
    ReplicaStatus,
    ServedModel,
    Tokens,
)
from serving.catalogue import Entry, entries
from serving.data_plane import private_folder
from serving.door import Door
from serving.metrics import Metrics
from serving.openai.routes import create_api
from serving.replay import DELAYS_SECONDS, Progress
from serving.wire import Batch, Wire, WireLostError

logger = logging.getLogger("ray.serve")

GONE = Refusal(
    503,
    "the engine replica went away, and so did those that were asked after it",
    LOST,
    retry_after_seconds=RETRY_AFTER_SECONDS,
)
STARTING = Refusal(503, "the engine replicas are starting", "starting", retry_after_seconds=RETRY_AFTER_SECONDS)
REPORT_SECONDS = 2.0
STATUS_SECONDS = 5.0
_REPLICA_LOST = (RayActorError, grpc.aio.AioRpcError, WireLostError)
_NONE_THERE = (BackPressureError, DeploymentUnavailableError)


class RemoteEngine:
    """A handle to the engine replicas of one version as a `Backend`."""

    def __init__(self, handle: DeploymentHandle, model: ServedModel, wire: Wire, metrics: Metrics) -> None:
        self._metrics = metrics
        self._wire = wire
        self._name = model.name
        self._digest = model.digest
        self._handle = handle
        self._door = Door()
        # Whole answers go this way too: Ray Serve does not hand the end of a unary call down to the replica. By gRPC,
        # which the environment asks for, but handles made in the driver do not know of: 5 ms less until the first token
        # than by references to objects.
        self._streaming = handle.options(stream=True, _by_reference=False)
        self._ending: set[asyncio.Task[None]] = set()
        """Ray Serve's side of calls, until they have ended there."""

    async def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The answers in batches; closing the iterator, or cancelling its reader, cancels the call in the replica."""
        refusal = self._door.refusal(call.answers)
        if refusal is not None:
            yield refusal
            return
        with self._door.passed(call.answers):
            async with aclosing(self._relayed(call)) as batches:
                async for batch in batches:
                    if isinstance(batch, Refusal) and batch.code == OverloadedError.code:
                        self._door.refused(batch)
                    yield batch

    async def _relayed(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        progress = Progress(call)
        while True:
            try:
                async with aclosing(self._attempt(progress)) as batches:
                    async for batch in batches:
                        if isinstance(batch, Refusal) and batch.code == LOST:
                            break
                        yield batch
                    else:
                        return
            except _NONE_THERE:
                yield UNAVAILABLE
                return
            except _REPLICA_LOST:
                pass
            if progress.complete:
                return
            delay = progress.lose()
            if delay is None:
                yield GONE
                return
            self._metrics.replayed(self._name)
            logger.warning("%s lost its replica; it goes on after %d tokens", call.id, progress.tokens)
            await asyncio.sleep(delay)

    async def _attempt(self, progress: Progress) -> AsyncGenerator[Batch, None]:
        """What one replica has of the rest of a call. Raises what Ray Serve does if it goes away."""
        call = progress.rest()
        with self._wire.inbox(call.id) as inbox:
            response = self._streaming.relay.remote(call, await self._wire.address())
            filling = asyncio.create_task(inbox.fill(response))
            self._ending.add(filling)
            filling.add_done_callback(self._ending.discard)
            try:
                while not progress.complete:
                    batch = await inbox.next()
                    if batch is None:
                        return
                    if not isinstance(batch, Refusal):
                        progress.note(batch)
                    yield batch
                    if isinstance(batch, Refusal):
                        return
            finally:
                if not progress.complete:
                    response.cancel()

    async def read(self, call: ReadCall) -> Readings | Refusal:
        """What the model says of texts."""
        return await _ask(lambda: self._handle.read.remote(call))

    async def tokenize(self, prompt: Prompt) -> Tokens | Refusal:
        """The token ids that a text or a conversation becomes."""
        return await _ask(lambda: self._handle.tokenize.remote(prompt))

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Refusal:
        """The text of token ids, special tokens left out."""
        return await _ask(lambda: self._handle.detokenize.remote(token_ids))

    async def statuses(self) -> Mapping[str, ReplicaStatus | Refusal]:
        """How one of the replicas is; waits a while if there is none."""
        return {self._digest: await self._status()}

    async def _status(self) -> ReplicaStatus | Refusal:
        try:
            async with asyncio.timeout(STATUS_SECONDS):
                return await self._handle.status.remote()
        except TimeoutError:
            return STARTING
        except (*_NONE_THERE, *_REPLICA_LOST):
            return UNAVAILABLE

    async def asleep(self) -> bool:
        """Whether no replica runs; does not start one."""
        return await self._reports() is None

    async def reports(self) -> Mapping[str, Sequence[LoadReport]]:
        """The work of each replica; of those that say nothing in time there is none."""
        return {self._digest: await self._reports() or ()}

    async def _reports(self) -> Sequence[LoadReport] | None:
        """None if there is no replica."""
        try:
            answers = await self._handle.broadcast("report").results_async(
                timeout_s=REPORT_SECONDS, return_exceptions=True
            )
        except TimeoutError:
            return ()
        except _NONE_THERE:
            return None
        return [answer for answer in answers if isinstance(answer, LoadReport)]


async def _ask(ask: Callable[[], Any]) -> Any:
    """One answer to a question that may be asked again of another replica."""
    for delay in DELAYS_SECONDS:
        await asyncio.sleep(delay)
        try:
            answer = await ask()
        except _NONE_THERE:
            return UNAVAILABLE
        except _REPLICA_LOST:
            continue
        if not (isinstance(answer, Refusal) and answer.code == LOST):
            return answer
    return GONE


class Ingress:
    """The HTTP side of the endpoint; a Ray Serve deployment wraps it.

    Args of the constructor:
        offers: the models.
        engines: the replicas of each, by name.
        canaries: those of the canaries, by the names of the models that have one.
        config: of the endpoint.
    """

    def __init__(
        self,
        offers: Sequence[Offer],
        engines: Mapping[str, DeploymentHandle],
        canaries: Mapping[str, DeploymentHandle],
        config: ServingConfig,
    ) -> None:
        metrics = Metrics([offer.model for offer in offers])
        wire = Wire(private_folder())
        catalogue: dict[str, Entry] = {}
        for offer in offers:
            name, other = offer.model.name, offer.model.canary
            stable = RemoteEngine(engines[name], offer.model, wire, metrics)
            canary = None if other is None else RemoteEngine(canaries[name], other, wire, metrics)
            catalogue |= entries(offer, stable, canary, metrics)
        self._api = create_api(catalogue, config, metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve in the replica."""
        return self._api
