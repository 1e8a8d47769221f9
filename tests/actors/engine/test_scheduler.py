"""Order, bounds and slots, without a model."""

import random

import pytest

from actors.engine.request import Request, StopStrings
from actors.engine.scheduler import Scheduler
from actors.engine.sequence import Sequence
from configs.errors import OverloadedError
from configs.schema.generation import Sampling


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence(name: str, prompt: int, new: int = 3) -> Sequence:
    request = Request(name, tuple(range(prompt)), Sampling(max_new_tokens=new))
    return Sequence(request, NoText(), StopStrings(()), frozenset(), max_tokens=prompt + new)


def test_requests_start_in_the_order_they_came() -> None:
    scheduler = Scheduler(max_sequences=2, max_queued=8, prefill_tokens=100)
    for name in "abc":
        scheduler.add(sequence(name, 5))
    assert [turn.sequence.request.id for turn in scheduler.schedule()] == ["a", "b"]


def test_a_long_prompt_is_cut_into_bounded_chunks_while_others_decode() -> None:
    scheduler = Scheduler(max_sequences=4, max_queued=8, prefill_tokens=10)
    first = sequence("first", 4, new=9)
    scheduler.add(first)
    scheduler.add(sequence("long", 25))
    sizes = []
    for _ in range(4):
        turns = scheduler.schedule()
        sizes.append([len(turn.span.tokens) for turn in turns])
        for turn in turns:
            turn.sequence.cached = turn.span.stop
            if turn.completes:
                turn.sequence.tokens.append(0)
    assert sizes == [[4, 6], [1, 10], [1, 9], [1, 1]]


def test_a_full_queue_refuses_and_room_admits_again() -> None:
    scheduler = Scheduler(max_sequences=1, max_queued=2, prefill_tokens=100)
    for name in "abc":
        scheduler.add(sequence(name, 2))
    with pytest.raises(OverloadedError, match="2 waiting"):
        scheduler.add(sequence("d", 2))
    scheduler.schedule()
    with pytest.raises(OverloadedError):
        scheduler.add(sequence("d", 2))
    scheduler.remove([scheduler.running[0]])
    scheduler.add(sequence("d", 2))


@pytest.mark.parametrize("seed", range(30))
def test_moves_keep_every_sequence_with_its_own_cache_row(seed: int) -> None:
    """Plays random arrivals, ends and cancellations against a cache of names."""
    draw = random.Random(seed)
    slots = draw.randrange(1, 6)
    scheduler = Scheduler(max_sequences=slots, max_queued=1000, prefill_tokens=draw.randrange(1, 20))
    cache: list[list[tuple[str, int]]] = [[] for _ in range(slots)]
    added = ended = 0
    while added < 40 or scheduler.has_work:
        if added < 40 and draw.random() < 0.6:
            scheduler.add(sequence(str(added), draw.randrange(1, 30), new=draw.randrange(1, 8)))
            added += 1
        turns = scheduler.schedule()
        assert [turn.span.slot for turn in turns] == list(range(len(turns)))
        gone = []
        for turn in turns:
            one, span = turn.sequence, turn.span
            row = cache[span.slot]
            assert row[: span.start] == [(one.request.id, position) for position in range(span.start)]
            row[span.start :] = [(one.request.id, position) for position in range(span.start, span.stop)]
            one.cached = span.stop
            if turn.completes:
                one.tokens.append(0)
                if len(one.tokens) == one.max_tokens:
                    gone.append(one)
        assert all(s.cached == len(s.tokens) - 1 for s in scheduler.running[:-1])
        everyone = [*scheduler.running, *scheduler.waiting]
        gone += [s for s in everyone if s not in gone and draw.random() < 0.05]
        ended += len(gone)
        for move in scheduler.remove(gone):
            cache[move.target][: move.length] = cache[move.source][: move.length]
    assert ended == 40
