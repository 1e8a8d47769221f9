"""Three minutes of four times what a real endpoint can do: nothing is lost, and it does what it can all the while."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving_load import ask
from benchmarks.serving_servers import serving_memory_bytes
from infra.deploy import Endpoint
from tests.serving.conftest import real_endpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SLOTS, QUEUE = 4, 8
TOKENS = 150
"""Of an answer: so many that a client on the same two cores can ask for four times what is answered."""
PEAK_SECONDS, SECONDS = 30.0, 180.0
TIMES = 4


@pytest.fixture(scope="module")
def endpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("home")
    settings = {"replicas_max": 1, "max_sequences": SLOTS, "max_queued": QUEUE, "first_token_seconds": 60}
    with real_endpoint(model_folder, home, **settings) as endpoint:
        yield endpoint


class Crowd:
    """Clients that cost little, and what became of each of them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.asked = 0
        self.tokens = 0
        """In whole answers."""
        self.outcomes: Counter[str] = Counter()

    async def ask(self) -> None:
        self.asked += 1
        prompt = f"def function_{self.asked}(first, second):"
        try:
            reply = await ask(self._port, "tiny", prompt, TOKENS, stream=False)
        except (RuntimeError, OSError) as error:
            told = " 503 " in str(error) and "retry-after: " in str(error).lower()
            self.outcomes["told to come back" if told else str(error)] += 1
        else:
            self.outcomes["answered"] += 1
            self.tokens += reply.tokens

    async def closed(self, seconds: float) -> tuple[float, float]:
        """Answers and tokens a second when as many ask as there is room for, each again once it has its answer."""
        answers, tokens, began = self.outcomes["answered"], self.tokens, time.monotonic()

        async def again() -> None:
            while time.monotonic() < began + seconds:
                await self.ask()

        await asyncio.gather(*[again() for _ in range(SLOTS + QUEUE // 2)])
        spent = time.monotonic() - began
        return (self.outcomes["answered"] - answers) / spent, (self.tokens - tokens) / spent

    async def open(self, rate: float, seconds: float) -> float:
        """Tokens a second when requests arrive at `rate`, by a Poisson process, whatever became of those before."""
        draw = random.Random(1)
        began, tokens = time.monotonic(), self.tokens
        arrives, asking = began, set()
        while (arrives := arrives + draw.expovariate(rate)) < began + seconds:
            await asyncio.sleep(max(0.0, arrives - time.monotonic()))
            task = asyncio.create_task(self.ask())
            asking.add(task)
            task.add_done_callback(asking.discard)
        found = (self.tokens - tokens) / (time.monotonic() - began)
        await asyncio.gather(*asking)
        return found


def test_goodput_holds_memory_is_flat_and_everybody_is_told(endpoint: Endpoint) -> None:
    async def main() -> tuple[Crowd, float, float, list[int]]:
        crowd = Crowd(int(endpoint.url.removesuffix("/v1").rpartition(":")[2]))
        await crowd.closed(PEAK_SECONDS / 3)
        answers, peak = await crowd.closed(PEAK_SECONDS)
        memory, goodput = [], []
        for seconds in (SECONDS / 6, 5 * SECONDS / 6):
            goodput.append(await crowd.open(TIMES * answers, seconds))
            memory.append(sum(serving_memory_bytes().values()))
        return crowd, peak, goodput[-1], memory

    crowd, peak, goodput, memory = asyncio.run(main())
    facts = f"peak {peak:.0f} tokens/s, goodput {goodput:.0f}, {dict(crowd.outcomes)}, {[m >> 20 for m in memory]} MB"
    print(facts)
    assert set(crowd.outcomes) == {"answered", "told to come back"}, facts
    assert crowd.outcomes.total() == crowd.asked, facts
    assert crowd.outcomes["told to come back"] > crowd.outcomes["answered"], facts
    assert goodput >= 0.9 * peak, facts
    assert memory[1] - memory[0] < 20 << 20, facts
