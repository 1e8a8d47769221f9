"""Batches of like length, without a model."""

import random

import pytest

from actors.engine.batching import LengthQueue


@pytest.mark.parametrize("seed", range(20))
def test_batches_are_bounded_hold_the_oldest_and_leave_nothing_behind(seed: int) -> None:
    draw = random.Random(seed)
    budget = draw.choice([1, 50, 300, 2000])
    queue = LengthQueue(budget)
    lengths: dict[str, int] = {}
    waiting: list[str] = []
    while len(lengths) < 200 or waiting:
        while len(lengths) < 200 and draw.random() < 0.8:
            name = str(len(lengths))
            lengths[name] = draw.randrange(1, draw.choice([5, 100, 400]))
            queue.add(name, lengths[name])
            waiting.append(name)
        if waiting and draw.random() < 0.2:
            gone = draw.choice(waiting)
            waiting.remove(gone)
            queue.remove(gone)
            queue.remove(gone)
        batch = queue.take()
        assert batch[:1] == [] if not waiting else waiting[0] in batch
        sizes = [lengths[name] for name in batch]
        assert sizes == sorted(sizes)
        if len(batch) > 1:
            area = max(sizes) * len(sizes)
            assert area <= budget
            assert area - sum(sizes) <= 0.1 * area
        for name in batch:
            waiting.remove(name)
        assert len(queue) == len(waiting)


def test_inputs_of_one_length_fill_a_batch() -> None:
    queue = LengthQueue(100)
    for n in range(25):
        queue.add(str(n), 10)
    assert [len(queue.take()) for _ in range(4)] == [10, 10, 5, 0]
