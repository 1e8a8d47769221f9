"""A real endpoint gets a second replica while there is work for two, and lets it go afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import serving.app
from infra.deploy import Endpoint
from tests.serving.conftest import real_endpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SEATS = 2


@pytest.fixture(scope="module")
def endpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.app, "DOWNSCALE_SECONDS", 10.0)  # ten minutes are too long for a test
        with real_endpoint(
            model_folder, home, replicas_min=1, replicas_max=2, cpus_per_replica=1, max_sequences=SEATS
        ) as endpoint:
            yield endpoint


async def replicas(client: httpx.AsyncClient) -> int:
    lines = (await client.get("/metrics")).text.splitlines()
    (line,) = (line for line in lines if line.startswith("ganymede:replicas{"))
    return int(float(line.rpartition(" ")[2]))


async def until(client: httpx.AsyncClient, wanted: int) -> None:
    deadline = time.monotonic() + 150
    while await replicas(client) != wanted:
        assert time.monotonic() < deadline, f"not {wanted} replicas"
        await asyncio.sleep(0.5)


def test_a_second_replica_comes_with_the_work_and_goes_with_it_and_no_answer_is_lost(endpoint: Endpoint) -> None:
    body = {"model": "tiny", "prompt": "def open", "max_tokens": 400, "temperature": 0}

    async def main() -> None:
        async with httpx.AsyncClient(base_url=endpoint.url.removesuffix("/v1"), timeout=120) as client:
            assert await replicas(client) == 1
            expected = (await client.post("/v1/completions", json=body)).json()["choices"]
            busy = True

            async def ask_again() -> int:
                answered = 0
                while busy:
                    answer = await client.post("/v1/completions", json=body)
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["choices"] == expected
                    answered += 1
                return answered

            load = [asyncio.create_task(ask_again()) for _ in range(2 * SEATS + 1)]
            await until(client, 2)
            busy = False
            assert all(count > 0 for count in await asyncio.gather(*load))
            await until(client, 1)
            assert (await client.post("/v1/completions", json=body)).json()["choices"] == expected

    asyncio.run(main())
