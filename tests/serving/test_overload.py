"""More than an endpoint can do: what it takes it answers, and everybody else is told so, soon."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.conftest import CONTEXT_LENGTH, local_endpoint

SLOTS, QUEUE = 2, 6
QUEUE_SECONDS, BODY_SECONDS = 1.0, 0.5


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    with local_endpoint(
        model_folder,
        max_sequences=SLOTS,
        max_queued=QUEUE,
        queue_limit_seconds=QUEUE_SECONDS,
        body_limit_seconds=BODY_SECONDS,
    ) as url:
        yield url


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "def open", "temperature": 0, "max_tokens": 40, **fields}


def test_at_four_times_the_capacity_all_are_answered_rightly_or_told_to_come_back(model_folder: Path) -> None:
    async def crowd(url: str) -> tuple[list[httpx.Response], httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=100)) as client:
            alone = await client.post("/v1/completions", json=body())
            asked = [client.post("/v1/completions", json=body()) for _ in range(4 * (SLOTS + QUEUE))]
            return await asyncio.gather(*asked), alone

    with local_endpoint(model_folder, max_sequences=SLOTS, max_queued=QUEUE) as url:
        answers, alone = asyncio.run(crowd(url))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 503}
    assert statuses[200] >= SLOTS + QUEUE
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["choices"] == alone.json()["choices"]
        else:
            assert answer.json()["error"]["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1


def test_who_waits_too_long_is_told_while_those_who_are_served_are_not_disturbed(url: str) -> None:
    async def wait() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            endless = body(stream=True, max_tokens=CONTEXT_LENGTH - 99)
            async with (
                client.stream("POST", "/v1/completions", json=endless) as first,
                client.stream("POST", "/v1/completions", json=endless) as second,
            ):
                began = time.monotonic()
                refused = await client.post("/v1/completions", json=body())
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
                assert "too long" in refused.json()["error"]["message"]
                assert QUEUE_SECONDS <= time.monotonic() - began < QUEUE_SECONDS + 10
                for answer in (first, second):
                    lines = answer.aiter_lines()
                    for _ in range(50):
                        assert "error" not in await anext(lines)

    asyncio.run(wait())


def test_a_body_that_does_not_come_is_not_waited_for(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b'{"model": "tiny"'
        )
        began = time.monotonic()
        answer = b""
        while b"}}" not in answer:
            answer += client.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert BODY_SECONDS <= time.monotonic() - began < BODY_SECONDS + 8
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
