"""The ingress, or HAProxy, killed while answers are on their way: what had not begun is retried, what had goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from infra.deploy import Endpoint
from tests.serving.conftest import real_endpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STREAMS, WHOLE = 4, 12
LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def endpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("home")
    with real_endpoint(model_folder, home, max_sequences=4, replicas_max=1, cpus_per_replica=0.5) as endpoint:
        yield endpoint


def kill(mark: str) -> None:
    """Every process below this one whose command line has `mark` in it."""
    found = [p for p in psutil.Process().children(recursive=True) if p.is_running() and mark in " ".join(p.cmdline())]
    assert found
    for process in found:
        os.kill(process.pid, signal.SIGKILL)


def body(seed: int | None, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "def open", "max_tokens": 400, "min_tokens": 400, "seed": seed, **fields}


class Client:
    """Streams an answer, and comes again after the last event it has whenever it is cut off."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url = f"{endpoint.url}/completions"
        self.text = ""
        self.breaks = 0
        self.seed = -1
        """That the answer was drawn with, once it has ended and if it says so."""
        self.begun = asyncio.Event()
        self._last: str | None = None

    async def stream(self, fields: dict[str, Any]) -> str:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not await self._go_on(fields):
            self.breaks += 1
            assert time.monotonic() < deadline
            await asyncio.sleep(0.3)
        return self.text

    async def _go_on(self, fields: dict[str, Any]) -> bool:
        """Whether the answer is whole now."""
        headers = {} if self._last is None else {"Last-Event-ID": self._last}
        try:
            async with (
                httpx.AsyncClient(timeout=LIMIT_SECONDS) as http,
                http.stream("POST", self._url, json={**fields, "stream": True}, headers=headers) as answer,
            ):
                if answer.status_code != 200:  # no route is known to a proxy that has just been started
                    return False
                async for line in answer.aiter_lines():
                    if line.startswith("id: "):
                        self._last = line.removeprefix("id: ")
                        self.begun.set()
                    elif line == "data: [DONE]":
                        return True
                    elif line.startswith("data: "):
                        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                        self.text += choice["text"]
                        self.seed = choice.get("sampling", {}).get("seed", -1)
        except httpx.TransportError:
            pass
        return False


async def whole(endpoint: Endpoint, seed: int) -> str:
    async with httpx.AsyncClient(timeout=LIMIT_SECONDS) as http:
        answer = await http.post(f"{endpoint.url}/completions", json=body(seed))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


def test_a_killed_ingress_costs_no_request_and_no_stream(endpoint: Endpoint) -> None:
    async def killed() -> None:
        undisturbed = await asyncio.gather(*(Client(endpoint).stream(body(seed)) for seed in range(STREAMS)))
        clients = [Client(endpoint) for _ in range(STREAMS)]
        streams = [asyncio.create_task(client.stream(body(seed))) for seed, client in enumerate(clients)]
        await asyncio.gather(*(client.begun.wait() for client in clients))
        waiting = [asyncio.create_task(whole(endpoint, number % STREAMS)) for number in range(WHOLE)]
        await asyncio.sleep(0.2)
        kill(":ingress")
        late = [asyncio.create_task(whole(endpoint, number)) for number in range(STREAMS)]
        assert await asyncio.gather(*streams) == undisturbed
        assert await asyncio.gather(*waiting) == undisturbed * (WHOLE // STREAMS)
        assert await asyncio.gather(*late) == undisturbed
        assert any(client.breaks for client in clients)

    asyncio.run(killed())


@pytest.mark.parametrize("victim", [":ingress", "/haproxy"])
def test_a_stream_without_a_seed_goes_on_with_the_tokens_that_would_have_come(endpoint: Endpoint, victim: str) -> None:
    async def killed() -> None:
        client = Client(endpoint)
        stream = asyncio.create_task(client.stream(body(None, return_sampling=True)))
        await client.begun.wait()
        kill(victim)
        text = await stream
        assert client.breaks
        assert text == await whole(endpoint, client.seed)

    asyncio.run(killed())
