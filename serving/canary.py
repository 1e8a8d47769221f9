"""A second version of the model, which gets a share of the requests.

Which version answers is a function of the two versions and of who asks (the field `user`) or, where that is not given,
of the request: sent again it goes to the same one, and a larger share keeps those who had the canary before. While no
replica of the canary can be asked, the stable version answers in its place: the answer's `system_fingerprint` says so,
a metric counts it, the log has it. An answer that has begun is ended by the version that began it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from hashlib import blake2b

from configs.schema.serving import ModelSettings
from serving.calls import (
    LOST,
    UNAVAILABLE,
    Backend,
    Call,
    LoadReport,
    Piece,
    Prompt,
    ReadCall,
    Readings,
    Refusal,
    ReplicaStatus,
    ServedModel,
    Tokens,
)
from serving.metrics import Metrics

logger = logging.getLogger("ray.serve")


def gets_canary(asker: str, versions: tuple[str, str], weight: float) -> bool:
    """Whether `asker`'s requests go to the second of two versions (digests), which gets this share of all askers."""
    drawn = blake2b("/".join((*versions, asker)).encode(), digest_size=8).digest()
    return int.from_bytes(drawn) < weight * (1 << 64)


def versions_of(
    model: ServedModel, settings: ModelSettings, stable: Backend, canary: Backend | None, metrics: Metrics
) -> Backend:
    """What answers for a model: its replicas, or those of its two versions."""
    if model.canary is None or settings.canary is None or canary is None:
        return stable
    return Split(stable, canary, model, weight=settings.canary.weight, metrics=metrics)


class Split:
    """Two versions of a model as one `Backend`.

    Args of the constructor:
        stable: the version that most requests go to; texts are tokenized by its tokenizer.
        canary: the other one.
        model: what they are.
        weight: the share of the canary, from 0 to 1.
        metrics: counts the requests that the stable version answers in place of the canary.
    """

    def __init__(
        self, stable: Backend, canary: Backend, model: ServedModel, *, weight: float, metrics: Metrics
    ) -> None:
        self._stable = stable
        self._canary = canary
        self._name = model.name
        first, second = (version.digest for version in model.versions)
        self._versions = (first, second)
        self._weight = weight
        self._metrics = metrics

    async def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The answers by the version that the call goes to."""
        chosen = self._chosen(call)
        begun = False
        async with aclosing(chosen.stream(call)) as batches:
            async for batch in batches:
                if not begun and self._falls_back(chosen, call, batch):
                    break
                begun = True
                yield batch
            else:
                return
        async with aclosing(self._stable.stream(call)) as batches:
            async for batch in batches:
                yield batch

    async def read(self, call: ReadCall) -> Readings | Refusal:
        """What the version that the call goes to says of texts."""
        chosen = self._chosen(call)
        result = await chosen.read(call)
        return await self._stable.read(call) if self._falls_back(chosen, call, result) else result

    async def tokenize(self, prompt: Prompt) -> Tokens | Refusal:
        """By the stable version."""
        return await self._stable.tokenize(prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Refusal:
        """By the stable version."""
        return await self._stable.detokenize(token_ids)

    async def statuses(self) -> Mapping[str, ReplicaStatus | Refusal]:
        """Of the version named first, then of the canary."""
        return {**await self._stable.statuses(), **await self._canary.statuses()}

    async def asleep(self) -> bool:
        """Whether no replica of the stable version runs."""
        return await self._stable.asleep()

    async def reports(self) -> Mapping[str, Sequence[LoadReport]]:
        """The work of the replicas of both."""
        return {**await self._stable.reports(), **await self._canary.reports()}

    def _chosen(self, call: Call | ReadCall) -> Backend:
        begun_by = call.begun_by if isinstance(call, Call) else None
        if begun_by is not None:
            return self._canary if begun_by == self._versions[1] else self._stable
        return self._canary if gets_canary(call.asker, self._versions, self._weight) else self._stable

    def _falls_back(self, chosen: Backend, call: Call | ReadCall, result: object) -> bool:
        """Whether the canary cannot be asked, and the stable version is to answer in its place."""
        gone = isinstance(result, Refusal) and result.code in (LOST, UNAVAILABLE.code)
        if chosen is self._stable or not gone or (isinstance(call, Call) and call.begun_by is not None):
            return False
        self._metrics.fell_back(self._name)
        logger.warning("%s goes to the stable version: no replica of the canary can be asked", call.id)
        return True
