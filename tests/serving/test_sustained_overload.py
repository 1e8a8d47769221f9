"""Three minutes of four times what a real endpoint can do: nothing is lost, and it does what it can all the while."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.serving_servers import serving_memory_bytes
from configs.schema.serving import ServingConfig
from infra.deploy import Endpoint, serve_model, stop_serving
from infra.local import quiet_environment, ray_session
from infra.platform import free_ports
from tests.serving.conftest import served

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SLOTS, QUEUE = 4, 8
TOKENS = 150
"""Of an answer: so many that a client on the same two cores can ask for four times what is answered."""
PEAK_SECONDS, SECONDS = 30.0, 180.0
TIMES = 4


@pytest.fixture(scope="module")
def endpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    quiet_environment()
    home = tmp_path_factory.mktemp("home")
    (home / "logs").mkdir()
    (port,) = free_ports(1)
    config = ServingConfig(
        port=port, replicas_max=1, max_sequences=SLOTS, max_queued=QUEUE, precision="fp32", first_token_seconds=60
    )
    with ray_session(home):
        yield serve_model(served(model_folder), config, say=lambda _: None)
        stop_serving()


class Crowd:
    """Clients, and what became of each of them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.asked = 0
        self.outcomes: Counter[str] = Counter()

    async def ask(self) -> None:
        self.asked += 1
        prompt = [5 + (self.asked * 7 + n) % 250 for n in range(20)]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0}
        try:
            answer = await self._client.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            self.outcomes[type(error).__name__] += 1
            return
        if answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == TOKENS:
            self.outcomes["answered"] += 1
        elif answer.status_code == 503 and int(answer.headers.get("retry-after", 0)) >= 1:
            self.outcomes["told to come back"] += 1
        else:
            self.outcomes[f"{answer.status_code} {answer.text[:100]}"] += 1

    async def closed(self, seconds: float) -> float:
        """Answers a second when as many ask as there is room for, each again once it has its answer."""
        ends = time.monotonic() + seconds
        before = self.outcomes["answered"]

        async def again() -> None:
            while time.monotonic() < ends:
                await self.ask()

        began = time.monotonic()
        await asyncio.gather(*[again() for _ in range(SLOTS + QUEUE // 2)])
        return (self.outcomes["answered"] - before) / (time.monotonic() - began)

    async def open(self, rate: float, seconds: float) -> float:
        """Answers a second when requests arrive at `rate`, by a Poisson process, whatever became of those before."""
        draw = random.Random(1)
        began, before = time.monotonic(), self.outcomes["answered"]
        arrives, asking = began, set()
        while (arrives := arrives + draw.expovariate(rate)) < began + seconds:
            await asyncio.sleep(max(0.0, arrives - time.monotonic()))
            task = asyncio.create_task(self.ask())
            asking.add(task)
            task.add_done_callback(asking.discard)
        found = (self.outcomes["answered"] - before) / (time.monotonic() - began)
        await asyncio.gather(*asking)
        return found


def test_goodput_holds_memory_is_flat_and_everybody_is_told(endpoint: Endpoint) -> None:
    async def main() -> tuple[Crowd, float, float, list[int]]:
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
        url = endpoint.url.removesuffix("/v1")
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            crowd = Crowd(client)
            await crowd.closed(PEAK_SECONDS / 3)
            peak = await crowd.closed(PEAK_SECONDS)
            memory = []
            answered = await crowd.open(TIMES * peak, SECONDS / 6)
            memory.append(sum(serving_memory_bytes().values()))
            answered += 5 * await crowd.open(TIMES * peak, 5 * SECONDS / 6)
            memory.append(sum(serving_memory_bytes().values()))
            return crowd, peak, answered / 6, memory

    crowd, peak, goodput, memory = asyncio.run(main())
    facts = f"peak {peak:.1f}/s, goodput {goodput:.1f}/s, {dict(crowd.outcomes)}, {[m >> 20 for m in memory]} MB"
    print(facts)
    assert set(crowd.outcomes) == {"answered", "told to come back"}, facts
    assert crowd.outcomes.total() == crowd.asked, facts
    assert crowd.outcomes["told to come back"] > crowd.outcomes["answered"], facts
    assert goodput >= 0.9 * peak, facts
    assert memory[1] - memory[0] < 20 << 20, facts
