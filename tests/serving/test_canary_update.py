"""A canary comes, is promoted and goes under load: no client of a real endpoint is refused or cut off."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import psutil
import pytest

from configs.schema.serving import CanaryConfig, ServingConfig
from infra.deploy import Endpoint, serve_model
from serving.calls import ServedModel, fingerprint
from serving.canary import gets_canary
from tests.serving.update_world import config, endpoint, versions

__all__ = ["config", "endpoint", "versions"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

CLIENTS = 6
TOKENS = 150
ANSWERS_IN_EACH_STATE = 2
"""That each client waits for before the endpoint changes again."""
WEIGHT = 0.5


@dataclass(frozen=True)
class Answer:
    """What one request brought, and in which state of the endpoint it was asked and answered."""

    user: str
    text: str
    finish_reason: str | None
    writer: str
    states: tuple[int, int]


class Load:
    """Clients that ask without a pause; any error of theirs is raised."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url = endpoint.url
        self.state = 0
        self.answers: list[Answer] = []
        self.over = False

    async def client(self, number: int) -> None:
        async with openai.AsyncOpenAI(base_url=self._url, api_key="-", max_retries=0, timeout=180) as api:
            while not self.over:
                state = self.state
                text, reason, prints = await ask(api, user(number), stream=number % 2 == 0)
                (writer,) = prints
                self.answers.append(Answer(user(number), text, reason, writer, (state, self.state)))

    def of(self, state: int) -> list[Answer]:
        return [answer for answer in self.answers if answer.states == (state, state)]

    async def answered(self, clients: asyncio.Future[Any]) -> None:
        """Waits until every client has had its answers in this state."""
        while len(self.of(self.state)) < CLIENTS * ANSWERS_IN_EACH_STATE:
            assert not clients.done(), clients.exception()
            await asyncio.sleep(0.05)


def user(number: int) -> str:
    return f"user-{number}"


async def ask(api: openai.AsyncOpenAI, who: str, *, stream: bool) -> tuple[str, str | None, set[str]]:
    fields: dict[str, Any] = {
        "model": "tiny",
        "prompt": "def open",
        "max_tokens": TOKENS,
        "temperature": 0,
        "user": who,
    }
    if not stream:
        whole = await api.completions.create(**fields)
        return whole.choices[0].text, whole.choices[0].finish_reason, {str(whole.system_fingerprint)}
    text, reason, prints = "", None, set()
    async for chunk in await api.completions.create(stream=True, **fields):
        prints.add(str(chunk.system_fingerprint))
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    return text, reason, prints


def replicas(name: str) -> list[int]:
    """Process ids of the replicas of a deployment."""
    found = psutil.Process().children(recursive=True)
    return sorted(p.pid for p in found if p.is_running() and f":{name}" in " ".join(p.cmdline()))


def test_a_canary_comes_and_is_promoted_under_load(
    endpoint: Endpoint, versions: tuple[ServedModel, ServedModel], config: ServingConfig
) -> None:
    first, second = versions
    shared = config.model_copy(update={"canary": CanaryConfig(model="tiny@candidate", weight=WEIGHT)})
    states = [(replace(first, canary=second), shared), (first, config), (replace(first, canary=second), shared)]
    states += [(second, config)]
    stable = replicas("engine")

    async def changes() -> list[Answer]:
        load = Load(endpoint)
        clients = asyncio.gather(*map(load.client, range(CLIENTS)))
        await load.answered(clients)
        for number, (model, settings) in enumerate(states, 1):
            load.state = -number
            await asyncio.to_thread(serve_model, model, settings, say=lambda _: None)
            load.state = number
            await load.answered(clients)
            if model is not second:
                assert replicas("engine") == stable
        load.over = True
        await clients
        return load.answers

    answers = asyncio.run(changes())
    texts: dict[str, set[str]] = {}
    for answer in answers:
        assert answer.finish_reason == "length"
        texts.setdefault(answer.writer, set()).add(answer.text)
    assert texts.keys() == {fingerprint(version.digest) for version in versions}
    assert all(len(found) == 1 for found in texts.values())
    for answer in answers:
        canary = gets_canary(answer.user, (first.digest, second.digest), WEIGHT)
        expected = {
            (0, 0): first, (1, 1): second if canary else first, (2, 2): first, (3, 3): second if canary else first,
            (4, 4): second,
        }.get(answer.states)  # fmt: skip
        assert expected is None or answer.writer == fingerprint(expected.digest)
    assert replicas("canary") == []


def test_a_canary_that_dies_costs_no_request(
    endpoint: Endpoint, versions: tuple[ServedModel, ServedModel], config: ServingConfig
) -> None:
    first, second = versions
    shared = config.model_copy(update={"canary": CanaryConfig(model="tiny@candidate", weight=WEIGHT)})
    serve_model(replace(first, canary=second), shared, say=lambda _: None)

    async def killed() -> list[Answer]:
        load = Load(endpoint)
        clients = asyncio.gather(*map(load.client, range(CLIENTS)))
        await load.answered(clients)
        for victim in replicas("canary"):
            os.kill(victim, signal.SIGKILL)
        load.state = 1
        await load.answered(clients)
        load.over = True
        await clients
        return load.answers

    answers = asyncio.run(killed())
    texts = {(answer.writer, answer.text) for answer in answers}
    assert len(texts) == 2
    assert httpx.get(endpoint.url.removesuffix("/v1") + "/health", timeout=30).status_code == 200
