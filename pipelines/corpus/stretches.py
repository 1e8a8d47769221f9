"""Small batches, made several steps at a time.

A batch of 16 rows of 256 tokens costs 80 to 160 us of calls into numpy, whatever it holds, and some 25 us for its
tokens. So a reader that goes step by step gets parts of a stretch of steps made in one pass. One that jumps pays for
the step it asks for and no other. What a step holds is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

_STRETCH_TOKENS = 1 << 16
"""Tokens made in one pass: the calls are then a tenth of the cost, and 1.1 MB is held."""

Rows = TypeVar("Rows")


class Slice(NamedTuple):
    """What a reader wants of every step: the rows of one rank."""

    rank: int
    world_size: int


class Stretches(Generic[Rows]):
    """Batches by step; holds the stretch that was made last.

    `make` gives a slice's rows of some steps, in order; `take` copies part of them, so that a batch may be written to.
    """

    def __init__(
        self,
        make: Callable[[range, Slice], Rows],
        take: Callable[[Rows, slice], Rows],
        *,
        batch_rows: int,
        row_tokens: int,
    ) -> None:
        self._make = make
        self._take = take
        self._batch_rows = batch_rows
        self._row_tokens = row_tokens
        self._held: tuple[Slice, range, Rows] | None = None

    def batch(self, step: int, wanted: Slice) -> Rows:
        """The rows of `step`. Raises what `make` does, be it for a step a little ahead."""
        count = self._batch_rows // wanted.world_size
        held = self._held
        if held is None or held[0] != wanted or step not in held[1]:
            follows = held is not None and held[0] == wanted and step == held[1].stop
            ahead = max(1, _STRETCH_TOKENS // (count * self._row_tokens)) if follows else 1
            steps = range(step, step + ahead)
            held = self._held = (wanted, steps, self._make(steps, wanted))
        _, steps, rows = held
        first = (step - steps.start) * count
        return self._take(rows, slice(first, first + count))
