"""The reading side of a replica: texts to vectors, classes, entities and scores, through an encoder.

A call with many texts has a bounded number of them in the engine's queue at once, so that it neither fills the queue
for others nor has a limit of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from copy import copy

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import Classification, Embedding, EncodeEvent, EncodeRequest, Encoding, Task
from actors.engine.stream import AsyncEngine
from configs.errors import EngineError, GanymedeError
from serving.calls import Capability, ReadCall, Readings, ReadTask, Refusal, Spent
from serving.timing import Lap

_TASKS: dict[ReadTask, Task] = {"embeddings": "embed", "classify": "classify", "ner": "tag"}


class Reader:
    """Answers calls over one encoder.

    Args of the constructor:
        engine: the encoder.
        running: the same, behind asyncio.
        digest: of the model; every answer carries it.
        most_in_flight: texts of one call that are in the engine at once.
    """

    def __init__(
        self,
        engine: EncoderEngine,
        running: AsyncEngine[EncodeRequest, EncodeEvent],
        *,
        digest: str,
        most_in_flight: int,
    ) -> None:
        self._task = engine.task
        self._running = running
        self._digest = digest
        self._most_in_flight = most_in_flight
        self.capabilities = _capabilities(engine)
        """What the model can be asked."""

    async def read(self, call: ReadCall) -> Readings | Refusal:
        """What the model says of the texts, in their order; a refusal if one of them is refused."""
        if call.task not in self.capabilities:
            return Refusal.incapable(call.task, self.capabilities)
        try:
            events, spent = await self._run(_requests(call, self._task))
        except GanymedeError as error:
            return Refusal.of(error)
        encodings = [event.encoding for event in events if event.encoding is not None]
        tokens = sum(event.prompt_tokens for event in events)
        if call.task == "score":
            return Readings((), _scores(encodings), tokens, self._digest, spent)
        return Readings(tuple(encodings), (), tokens, self._digest, spent)

    async def _run(self, requests: Sequence[EncodeRequest]) -> tuple[list[EncodeEvent], Spent]:
        """Runs requests; raises the first error, and cancels the others then. Their events, and the longest's time."""
        room = asyncio.Semaphore(self._most_in_flight)
        lap = Lap()

        async def one(request: EncodeRequest) -> tuple[EncodeEvent, Spent]:
            async with room:
                async for event in self._running.stream(request):
                    if event.error is not None:
                        raise event.error
                    return event, copy(lap).next(event)
            raise EngineError(f"request {request.id} ended without a result")

        tasks = [asyncio.create_task(one(request)) for request in requests]
        try:
            done = await asyncio.gather(*tasks)
            return [event for event, _ in done], max((spent for _, spent in done), key=lambda spent: spent.total)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _capabilities(engine: EncoderEngine) -> tuple[Capability, ...]:
    if engine.task == "embed":
        return ("embeddings", "score")
    if engine.task == "tag":
        return ("ner",)
    return ("classify", "score") if len(engine.labels) == 1 else ("classify",)


def _requests(call: ReadCall, task: Task) -> list[EncodeRequest]:
    """One a text; to score pairs by their embeddings, each text of a pair by itself."""
    if call.task == "score" and task == "embed":
        texts: Sequence[tuple[str, str | None]] = [(text, None) for text in (*call.texts, *(call.pairs or ()))]
    else:
        texts = list(zip(call.texts, call.pairs or [None] * len(call.texts), strict=True))
    asked = task if call.task == "score" else _TASKS[call.task]
    return [
        EncodeRequest(f"{call.id}-{index}", text, asked, pair, truncate=call.truncate, normalize=call.normalize)
        for index, (text, pair) in enumerate(texts)
    ]


def _scores(encodings: Sequence[Encoding]) -> tuple[float, ...]:
    """A cross-encoder's own value for each pair; the cosine of two normalized embeddings elsewhere."""
    own = [next(iter(each.scores.values())) for each in encodings if isinstance(each, Classification)]
    if own:
        return tuple(own)
    vectors = [each.vector for each in encodings if isinstance(each, Embedding)]
    half = len(vectors) // 2
    pairs = zip(vectors[:half], vectors[half:], strict=True)
    return tuple(sum(a * b for a, b in zip(first, second, strict=True)) for first, second in pairs)
