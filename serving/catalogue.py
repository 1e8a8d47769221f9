"""The names that clients may ask for, and who answers: models, and adapters over them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

from configs.schema.serving import ModelSettings
from serving.calls import (
    AdapterSource,
    Backend,
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
from serving.canary import versions_of
from serving.metrics import Metrics


@dataclass(frozen=True)
class Entry:
    """One name."""

    model: ServedModel
    settings: ModelSettings
    """Of its replicas; an adapter's are those of its base."""
    backend: Backend


Catalogue = Mapping[str, Entry]
"""The entries by name; a model comes before its adapters."""


def entries(offer: Offer, stable: Backend, canary: Backend | None, metrics: Metrics) -> dict[str, Entry]:
    """A model and its adapters, which belong to the version that most requests go to: another one has other weights.

    Args:
        offer: the model.
        stable: its replicas.
        canary: those of its canary, if there is one.
        metrics: counts what the canary leaves to the stable version.
    """
    model, settings = offer.model, offer.settings
    found = {model.name: Entry(model, settings, versions_of(model, settings, stable, canary, metrics))}
    for each in model.adapters:
        if each.adapter is not None:
            found[each.name] = Entry(each, settings, Adapted(stable, each.adapter))
    return found


class Adapted:
    """The replicas of a model with one of its adapters, as a `Backend`."""

    def __init__(self, base: Backend, adapter: AdapterSource) -> None:
        self._base = base
        self._adapter = adapter

    def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """What the adapter writes."""
        return self._base.stream(replace(call, adapter=self._adapter))

    async def read(self, call: ReadCall) -> Readings | Refusal:
        """Refused by the base, which writes."""
        return await self._base.read(call)

    async def tokenize(self, prompt: Prompt) -> Tokens | Refusal:
        """By the base: both have the same text contract."""
        return await self._base.tokenize(prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Refusal:
        """By the base."""
        return await self._base.detokenize(token_ids)

    async def statuses(self) -> Mapping[str, ReplicaStatus | Refusal]:
        """How a replica of the base is, under the adapter's own digest."""
        (status,) = (await self._base.statuses()).values()
        return {self._adapter.key: status}

    async def asleep(self) -> bool:
        """Whether no replica of the base runs."""
        return await self._base.asleep()

    async def reports(self) -> Mapping[str, Sequence[LoadReport]]:
        """None of its own: the work is the base's."""
        return {}
