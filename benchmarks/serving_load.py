"""A client that costs little: raw HTTP over asyncio, so that on few cores the server has them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What one request got."""

    tokens: int
    """By the server's own count where it gives one, else events with text."""
    first_token_seconds: float
    seconds: float


async def ask(port: int, model: str, prompt: str, tokens: int, *, stream: bool) -> Reply:
    """One greedy completion. Raises `RuntimeError` for anything but an answer."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r} {(await reader.read())[-1000:]!r}")
        first, events = 0.0, 0
        if not stream:
            answer = await reader.read()
            usage = json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])["usage"]
            seconds = time.perf_counter() - began
            return Reply(usage["completion_tokens"], seconds, seconds)
        while line := await reader.readline():
            # Without parsing: an event of a token is one whose text is not empty, in either server's spelling.
            if line.startswith(b"data: {") and b'"text":""' not in line and b'"text": ""' not in line:
                first = first or time.perf_counter() - began
                events += 1
        return Reply(events, first, time.perf_counter() - began)
    finally:
        writer.close()


async def closed_loop(
    port: int, model: str, prompts: Sequence[str], tokens: int, *, concurrency: int, stream: bool
) -> tuple[float, list[Reply]]:
    """All prompts, so many at a time: one that ends is followed by the next. Seconds, and the replies."""
    room = asyncio.Semaphore(concurrency)

    async def one(prompt: str) -> Reply:
        async with room:
            return await ask(port, model, prompt, tokens, stream=stream)

    began = time.perf_counter()
    replies = await asyncio.gather(*map(one, prompts))
    return time.perf_counter() - began, list(replies)


def rates(seconds: float, replies: Sequence[Reply], tokens: int) -> dict[str, float]:
    """Tokens a second, counting what was asked for, as random models never end early; and the times to first token."""
    firsts = sorted(reply.first_token_seconds for reply in replies)
    return {
        "output_tokens_per_second": len(replies) * tokens / seconds,
        "median_first_token_seconds": median(firsts),
        "p99_first_token_seconds": firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))],
    }
