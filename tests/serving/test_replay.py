"""Going on with an answer that another replica began: what is left of a call, and that the rest is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.schema.generation import Sampling, Structure
from configs.schema.serving import ServingConfig
from serving.calls import Call, Piece, Refusal
from serving.replay import DELAYS_SECONDS, Progress
from serving.replica import EngineReplica
from tests.actors.conftest import tokenizer_folder  # noqa: F401 - a fixture
from tests.actors.engine.conftest import MakeSeq2Seq, make_seq2seq  # noqa: F401 - fixtures
from tests.serving.conftest import served

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9},
    "nucleus with penalties": {"top_p": 0.8, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    "repetition and bias": {"repetition_penalty": 1.4, "logit_bias": {70: 3.0}, "min_p": 0.02},
    "stop strings": {"stop": ("pa", "e", "open the"), "temperature": 0.7},
    "late stop": {"stop_token_ids": (70, 80, 90, 100), "min_tokens": 7, "temperature": 1.5},
    "scores": {"logprobs": 2, "prompt_logprobs": 2},
    "structure": {"structure": Structure(regex="[a-f0-9äö🦉]{6,30}")},
}


@pytest.fixture(scope="module")
def replicas(model_folder: Path) -> Iterator[tuple[EngineReplica, EngineReplica]]:
    config = ServingConfig(max_sequences=4, precision="fp32")
    pair = EngineReplica(served(model_folder), config), EngineReplica(served(model_folder), config)
    yield pair
    for replica in pair:
        replica.close()


async def pieces(stream: AsyncGenerator[Sequence[Piece] | Refusal, None], most: int | None = None) -> list[Piece]:
    """The pieces of a stream, or the first ones; the rest is cancelled then."""
    found: list[Piece] = []
    async for batch in stream:
        assert not isinstance(batch, Refusal), batch
        found += batch
        if most is not None and len(found) >= most:
            break
    await stream.aclose()
    return found


def said(found: Sequence[Piece]) -> dict[int, tuple[Any, ...]]:
    """What was given out in all, by answer."""
    answers: dict[int, list[Piece]] = {}
    for piece in found:
        answers.setdefault(piece.index, []).append(piece)
    return {
        index: (
            whole.text, whole.token_ids, whole.finish_reason, whole.completion_tokens, whole.prompt_tokens,
            [(s.token, s.offset, [token for token, _ in s.top]) for s in whole.scores or ()],
        )
        for index, whole in ((index, Piece.joined(parts)) for index, parts in answers.items())
    }  # fmt: skip


async def broken_off(call: Call, first: EngineReplica, second: EngineReplica, after: int) -> list[Piece]:
    """The answers as a client gets them whose replica goes away after some pieces."""
    progress = Progress(call)
    begun = await pieces(first.stream(progress.rest()), most=after)
    progress.note(begun)
    if progress.complete:
        return begun
    assert progress.lose() == 0
    return begun + await pieces(second.stream(progress.rest()))


@pytest.mark.parametrize("name", SETTINGS)
def test_another_replica_goes_on_with_the_same_tokens_wherever_it_takes_over(
    replicas: tuple[EngineReplica, EngineReplica], name: str
) -> None:
    sampling = Sampling(**SETTINGS[name])
    echo = sampling.prompt_logprobs is not None
    call = Call("a", ("def open", "the path at"), (5, 6), sampling, max_new_tokens=20, choices=2, echo=echo)

    async def compare() -> None:
        whole = said(await pieces(replicas[0].stream(call)))
        assert sum(len(answer[1]) for answer in whole.values()) > 20
        for after in (1, 3, 10, 30):
            assert said(await broken_off(call, *replicas, after)) == whole

    asyncio.run(compare())


def test_an_encoder_decoder_goes_on_too(make_seq2seq: MakeSeq2Seq) -> None:  # noqa: F811
    replica = EngineReplica(served(make_seq2seq("bart")), ServingConfig(max_sequences=4, precision="fp32"))
    call = Call("a", ("def open the path",), (7,), Sampling(temperature=0.8), max_new_tokens=24, choices=2)

    async def compare() -> None:
        whole = said(await pieces(replica.stream(call)))
        for after in (1, 9):
            assert said(await broken_off(call, replica, replica, after)) == whole

    asyncio.run(compare())
    replica.close()


def test_no_other_model_goes_on_with_an_answer(replicas: tuple[EngineReplica, EngineReplica]) -> None:
    call = Call("a", ("def",), (1,), max_new_tokens=5, begun=((70,),), begun_by="another")

    async def first() -> Any:
        return await anext(replicas[0].stream(call))

    refusal = asyncio.run(first())
    assert (refusal.status, refusal.code) == (503, "model_replaced")


def test_replays_without_a_token_in_between_come_to_an_end() -> None:
    progress = Progress(Call("a", ("def",), (1,)))
    assert [progress.lose() for _ in DELAYS_SECONDS] == list(DELAYS_SECONDS)
    progress.note([Piece(0, "x", 1, 1, model_digest="digest", token_ids=(70,))])
    assert progress.lose() == DELAYS_SECONDS[0]
    assert progress.rest().begun == ((70,),)
    progress.note([Piece(0, "y", 1, 2, "length", model_digest="digest", token_ids=(71,))])
    assert progress.complete
    assert [progress.lose() for _ in range(len(DELAYS_SECONDS) + 1)][-1] is None
