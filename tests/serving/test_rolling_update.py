"""A model is replaced under load: no client of a real endpoint is refused or cut off, no answer mixes two models."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from configs.schema.serving import ServingConfig
from infra.deploy import Endpoint, serve_model
from serving.calls import ServedModel, fingerprint
from tests.serving.update_world import config, endpoint, versions

__all__ = ["config", "endpoint", "versions"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

CLIENTS = 6
PROMPTS = ("def open", "the path", "return the mode")
TOKENS = 300
ANSWERS_AFTERWARDS = 2
"""That each client waits for once the update is through."""


@dataclass(frozen=True)
class Answer:
    """What one request brought."""

    prompt: str
    text: str
    finish_reason: str | None
    fingerprints: frozenset[str]


async def ask(client: openai.AsyncOpenAI, prompt: str, *, stream: bool) -> Answer:
    fields: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    if not stream:
        whole = await client.completions.create(**fields)
        choice = whole.choices[0]
        return Answer(prompt, choice.text, choice.finish_reason, frozenset({str(whole.system_fingerprint)}))
    text, reason, prints = "", None, set()
    async for chunk in await client.completions.create(stream=True, **fields):
        prints.add(str(chunk.system_fingerprint))
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    return Answer(prompt, text, reason, frozenset(prints))


async def load(endpoint: Endpoint, model: ServedModel, config: ServingConfig) -> tuple[list[Answer], list[Answer]]:
    """What all clients got until `model` had taken over, and what they got afterwards; any error is raised."""
    updated = asyncio.Event()
    before: list[Answer] = []
    after: list[Answer] = []

    async def client(number: int) -> None:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="-", max_retries=0, timeout=180) as api:
            count = last = 0
            while last < ANSWERS_AFTERWARDS:
                late = updated.is_set()
                answer = await ask(api, PROMPTS[count % len(PROMPTS)], stream=number > 0)
                (after if late else before).append(answer)
                last += late
                count += 1

    clients = asyncio.gather(*map(client, range(CLIENTS)))
    while len(before) < CLIENTS:
        assert not clients.done()
        await asyncio.sleep(0.05)
    await asyncio.to_thread(serve_model, model, config, say=lambda _: None)
    updated.set()
    await clients
    return before, after


def undisturbed(endpoint: Endpoint) -> dict[str, str]:
    async def one_by_one() -> dict[str, str]:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="-", max_retries=0, timeout=180) as api:
            return {prompt: (await ask(api, prompt, stream=True)).text for prompt in PROMPTS}

    return asyncio.run(one_by_one())


def check(endpoint: Endpoint, first: ServedModel, second: ServedModel, config: ServingConfig) -> None:
    """Updates from `first` to `second` under load; every answer has to be one that one of them gives undisturbed."""
    texts = {fingerprint(first.digest): undisturbed(endpoint)}
    before, after = asyncio.run(load(endpoint, second, config))
    texts[fingerprint(second.digest)] = undisturbed(endpoint)
    assert texts[fingerprint(first.digest)] != texts[fingerprint(second.digest)]
    for answer in before + after:
        assert len(answer.fingerprints) == 1
        assert answer.finish_reason == "length"
        (writer,) = answer.fingerprints
        assert answer.text == texts[writer][answer.prompt]
    assert {writer for answer in before for writer in answer.fingerprints} >= {fingerprint(first.digest)}
    assert {writer for answer in after for writer in answer.fingerprints} == {fingerprint(second.digest)}
    assert len(after) == CLIENTS * ANSWERS_AFTERWARDS


def test_with_room_for_both_no_request_fails_and_the_new_model_answers_in_the_end(
    endpoint: Endpoint, versions: tuple[ServedModel, ServedModel], config: ServingConfig
) -> None:
    check(endpoint, *versions, config)


def test_without_room_for_both_requests_wait_and_none_fails(
    endpoint: Endpoint, versions: tuple[ServedModel, ServedModel], config: ServingConfig
) -> None:
    """The new replica takes every CPU, so that the old one has to end first."""
    import ray  # reads the environment that the endpoint's session has set

    whole = config.model_copy(update={"cpus_per_replica": float(ray.cluster_resources()["CPU"])})
    check(endpoint, versions[1], versions[0], whole)
