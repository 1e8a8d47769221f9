"""Rows of the cross-attention's cache, without a model."""

import random

import pytest

from actors.engine.rows import Layout
from actors.engine.sources import Source, SourceRows


@pytest.mark.parametrize("seed", range(20))
def test_each_source_keeps_its_own_row_within_the_capacity(seed: int) -> None:
    """Plays random sources against a cache of names."""
    draw = random.Random(seed)
    longest = draw.choice([50, 64, 200, 512])
    capacity = longest * draw.randrange(1, 5) + draw.randrange(64)
    books = SourceRows(capacity=capacity, longest=longest)
    cache: dict[int, int] = {}
    seated: list[Source] = []
    done = 0
    while done < 100:
        source = Source((0,) * draw.randrange(1, longest + 1))
        while not books.seat(source):
            assert seated, "a source that is alone always has room"
            gone = seated.pop(draw.randrange(len(seated)))
            books.leave(gone, spoiled=draw.random() < 0.3)
        seated.append(source)
        for command in books.take_commands():
            if isinstance(command, Layout):
                assert command.rows * command.width <= capacity
                cache = {row: cache.get(old, 0) for row, (old, _) in enumerate(command.kept)}
            else:
                cache = {
                    row: name for row, name in cache.items() if row < len(command.lengths) and command.lengths[row]
                }
        cache[source.row] = id(source)
        assert len({s.row for s in seated}) == len(seated)
        for one in seated:
            assert cache[one.row] == id(one)
            assert one.row < books.count
            assert len(one.tokens) <= books.width
        done += 1
