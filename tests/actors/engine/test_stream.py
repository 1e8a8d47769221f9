"""The engine behind asyncio: streams, cancellation, refusal, failure, end."""

import asyncio
from pathlib import Path

import pytest

from actors.engine.engine import Engine
from actors.engine.request import Completion, Request
from actors.engine.stream import AsyncEngine
from configs.errors import EngineError, OverloadedError, RequestError
from configs.schema.generation import Sampling


@pytest.fixture
def folder(make_model) -> Path:
    return make_model(end=False, max_position_embeddings=4096)


def load(folder: Path, **options: int) -> Engine:
    return Engine.load(folder, precision="fp32", device="cpu", **options)


def request(name: str, new: int = 20, **sampling: object) -> Request:
    return Request(name, (10, 11, 12), Sampling(max_new_tokens=new, **sampling))


async def collect(engine: AsyncEngine, asked: Request) -> Completion:
    return Completion.of([event async for event in engine.stream(asked)])


def test_concurrent_streams_get_what_the_engine_gives_alone(folder: Path) -> None:
    asked = [request(str(n), new=5 + n, seed=n) for n in range(12)]
    expected = load(folder).generate(asked)
    engine = AsyncEngine(load(folder, max_sequences=4))

    async def run() -> list[Completion]:
        return await asyncio.gather(*(collect(engine, one) for one in asked))

    assert asyncio.run(run()) == expected
    assert asyncio.run(collect(engine, asked[0])) == expected[0]
    engine.close()


def test_a_closed_stream_cancels_its_request_and_frees_its_place(folder: Path) -> None:
    inner = load(folder, max_sequences=1)
    engine = AsyncEngine(inner)

    async def run() -> Completion:
        stream = engine.stream(request("long", new=4000))
        await anext(stream)
        await stream.aclose()
        return await asyncio.wait_for(collect(engine, request("next", new=2)), timeout=20)

    assert len(asyncio.run(run()).token_ids) == 2
    engine.close()
    assert inner.tokens_run < 2000


def test_a_cancelled_task_cancels_its_request(folder: Path) -> None:
    inner = load(folder, max_sequences=1)
    engine = AsyncEngine(inner)

    async def run() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in engine.stream(request("long", new=4000)):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await collect(engine, request("next", new=2))

    asyncio.run(run())
    engine.close()
    assert inner.tokens_run < 2000


def test_refusals_are_raised_to_the_one_who_asked(folder: Path) -> None:
    engine = AsyncEngine(load(folder, max_sequences=1, max_queued=1))

    async def run() -> None:
        with pytest.raises(RequestError, match="empty"):
            await collect(engine, Request("empty", (), Sampling()))
        streams = [engine.stream(request(str(n), new=4000)) for n in range(2)]
        await anext(streams[0])
        waiting = asyncio.ensure_future(anext(streams[1]))
        await asyncio.sleep(0.1)
        with pytest.raises(OverloadedError):
            await collect(engine, request("third"))
        waiting.cancel()
        await streams[0].aclose()

    asyncio.run(run())
    assert engine.healthy
    engine.close()


def test_closing_ends_open_streams_with_an_error_and_refuses_new_ones(folder: Path) -> None:
    engine = AsyncEngine(load(folder))

    async def run() -> None:
        stream = engine.stream(request("open", new=4000))
        await anext(stream)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="closed"):
            await collect(engine, request("late"))

    asyncio.run(run())
    assert not engine.healthy


def test_a_failing_step_reaches_every_stream_and_later_requests(folder: Path) -> None:
    inner = load(folder)
    engine = AsyncEngine(inner)

    async def run() -> list[BaseException]:
        streams = [engine.stream(request(str(n), new=4000)) for n in range(3)]
        for stream in streams:
            await anext(stream)
        # A cache that is gone stands for a device that is lost.
        del inner._cache._kv_LARKPD
        results = await asyncio.gather(*(drain(stream) for stream in streams), return_exceptions=True)
        return [*results, *await asyncio.gather(collect(engine, request("late")), return_exceptions=True)]

    async def drain(stream) -> None:
        async for _ in stream:
            pass

    for error in asyncio.run(run()):
        assert isinstance(error, EngineError)
        assert "_kv_LARKPD" in str(error)
    assert not engine.healthy
    engine.close()


def test_a_dead_event_loop_does_not_stop_the_engine(folder: Path) -> None:
    engine = AsyncEngine(load(folder, max_sequences=1))
    loop = asyncio.new_event_loop()
    stream = engine.stream(request("orphan", new=4000))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert len(asyncio.run(collect(engine, request("next", new=3))).token_ids) == 3
    engine.close()
