"""Replicas that are killed while they answer: clients of a real endpoint with two of them notice only a pause."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from configs.schema.serving import ServingConfig
from infra.deploy import Endpoint, serve_model, stop_serving
from infra.local import quiet_environment, ray_session
from infra.platform import free_ports
from tests.serving.conftest import served

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKENS = 400
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0, "prompt": "def open"},
    {"temperature": 0, "prompt": ["the path", "return the mode"]},
    {"seed": 3, "prompt": "def open", "logprobs": 0},
    {"seed": 4, "prompt": "at the file", "n": 2, "presence_penalty": 1},
    {"seed": 5, "prompt": "open", "stop": "open the file at the path"},
    {"seed": 6, "prompt": "def", "echo": True, "top_p": 0.9},
]


@pytest.fixture(scope="module")
def config() -> ServingConfig:
    (port,) = free_ports(1)
    return ServingConfig(port=port, replicas_min=2, replicas_max=2, cpus_per_replica=0.5, precision="fp32")


@pytest.fixture(scope="module")
def endpoint(model_folder: Path, config: ServingConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    quiet_environment()
    home = tmp_path_factory.mktemp("home")
    (home / "logs").mkdir()
    with ray_session(home):
        yield serve_model(served(model_folder), config, say=lambda _: None)
        stop_serving()


def replicas() -> list[int]:
    """Process ids of the engine replicas."""
    found = psutil.Process().children(recursive=True)
    return [p.pid for p in found if p.is_running() and ":engine" in " ".join(p.cmdline())]


def metric(endpoint: Endpoint, name: str) -> float:
    text = httpx.get(endpoint.url.removesuffix("/v1") + "/metrics", timeout=30).text
    return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])


def wait_for_replicas(endpoint: Endpoint, count: int) -> None:
    deadline = time.monotonic() + 180
    while len(replicas()) < count or metric(endpoint, "ganymede:replicas") < count:
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Client:
    """Streams requests, and counts what has come of all of them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url = endpoint.url
        self.chunks = 0

    async def stream(self, fields: dict[str, Any]) -> dict[int, tuple[str, str | None]]:
        texts: dict[int, str] = {}
        reasons: dict[int, str | None] = {}
        async with openai.AsyncOpenAI(base_url=self._url, api_key="unused", max_retries=0, timeout=180) as client:
            async for chunk in await client.completions.create(model="tiny", max_tokens=TOKENS, stream=True, **fields):
                self.chunks += 1
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + choice.text
                    reasons[choice.index] = choice.finish_reason
        return {index: (text, reasons[index]) for index, text in texts.items()}

    async def all(self) -> list[dict[int, tuple[str, str | None]]]:
        return await asyncio.gather(*map(self.stream, REQUESTS))


@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_of_a_lost_replica_go_on_with_the_same_tokens(endpoint: Endpoint, loss: signal.Signals) -> None:
    """Killed, or stopped: one that hangs is ended by Ray Serve once it does not say that it is well."""

    async def lost() -> Any:
        client = Client(endpoint)
        streams = asyncio.create_task(client.all())
        while client.chunks < 200:
            await asyncio.sleep(0.01)
        os.kill(replicas()[0], loss)
        return await streams

    wait_for_replicas(endpoint, 2)
    undisturbed = asyncio.run(Client(endpoint).all())
    assert all(reason for answers in undisturbed for _, reason in answers.values())
    before = metric(endpoint, "ganymede:replays_total")
    assert asyncio.run(lost()) == undisturbed
    assert metric(endpoint, "ganymede:replays_total") > before
    assert metric(endpoint, "ganymede:broken_answers_total") == 0


def test_an_answer_that_is_not_streamed_is_begun_again(endpoint: Endpoint) -> None:
    async def killed() -> Any:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=180) as client:
            body = {"model": "tiny", "prompt": ["def", "open"] * 4, "temperature": 0, "max_tokens": TOKENS}
            whole = (await client.post("/completions", json=body)).json()["choices"]
            asked = [asyncio.create_task(client.post("/completions", json=body)) for _ in range(2)]
            await asyncio.sleep(0.5)
            os.kill(replicas()[0], signal.SIGKILL)
            return whole, [answer.json()["choices"] for answer in await asyncio.gather(*asked)]

    whole, answers = asyncio.run(killed())
    assert answers == [whole, whole]
    wait_for_replicas(endpoint, 2)


def test_the_death_of_every_replica_is_survived_too(endpoint: Endpoint) -> None:
    async def killed() -> Any:
        client = Client(endpoint)
        streams = asyncio.create_task(client.all())
        while client.chunks < 100:
            await asyncio.sleep(0.01)
        for victim in replicas():
            os.kill(victim, signal.SIGKILL)
        return await streams

    wait_for_replicas(endpoint, 2)
    undisturbed = asyncio.run(Client(endpoint).all())
    assert asyncio.run(killed()) == undisturbed
