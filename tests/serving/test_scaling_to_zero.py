"""A real endpoint whose last replica goes when there is nothing to do, and comes back for the next request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from infra.deploy import Endpoint
from tests.serving.conftest import real_endpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def endpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("home")
    with real_endpoint(model_folder, home, replicas_min=0, replicas_max=1, idle_seconds=3) as endpoint:
        yield endpoint


async def until_asleep(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + 120
    while (await client.get("/health")).json()["status"] != "asleep":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.5)


def test_requests_wait_for_the_replica_that_they_start(endpoint: Endpoint) -> None:
    async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
        body = {"model": "tiny", "prompt": f"def {number}", "max_tokens": 4, "temperature": 0}
        return await client.post("/v1/completions", json=body)

    async def main() -> None:
        async with httpx.AsyncClient(base_url=endpoint.url.removesuffix("/v1"), timeout=120) as client:
            before = [(await ask(client, number)).json()["choices"] for number in range(4)]
            for _ in range(2):
                await until_asleep(client)
                # Looking does not wake it.
                assert (await client.get("/metrics")).status_code == 200
                assert (await client.get("/v1/models")).status_code == 200
                assert (await client.get("/health")).json() == {
                    "status": "asleep",
                    "models": {"tiny": {"status": "asleep"}},
                }
                answers = await asyncio.gather(*[ask(client, number) for number in range(4)])
                assert [answer.status_code for answer in answers] == [200] * 4
                assert [answer.json()["choices"] for answer in answers] == before
                assert (await client.get("/health")).json()["status"] == "ok"

    asyncio.run(main())
