"""What the replicas would refuse is refused at the door.

A refusal costs the way to a replica and back, which processors that are busy do not have to give: with four times as
many requests as could be answered (2 cores, one replica, some 60 requests/s for three minutes, the clients on the same
cores), refusing in the replica left 0.54 of the answers a second that there were without the crowd; at the door, with
clients that cost less, it was 1.00.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving.calls import Refusal

REMEMBERED_SECONDS = 0.25
"""For so long a replica's refusal speaks for all: with several of them another may have room, and answers end."""


class Door:
    """Counts what is in flight to the replicas, and remembers at what count one of them had no room."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._inside = 0
        self._too_many = math.inf
        self._until = -math.inf
        self._refusal: Refusal | None = None

    def refusal(self, sequences: int) -> Refusal | None:
        """What to tell a call of so many answers; None if it may go in."""
        full = self._clock() < self._until and self._inside + sequences >= self._too_many
        return self._refusal if full else None

    @contextmanager
    def passed(self, sequences: int) -> Iterator[None]:
        """A call of so many answers is in flight meanwhile."""
        self._inside += sequences
        try:
            yield
        finally:
            self._inside -= sequences

    def refused(self, refusal: Refusal) -> None:
        """A replica had no room for a call, which is still counted."""
        now = self._clock()
        self._too_many = min(self._inside, self._too_many if now < self._until else math.inf)
        self._until, self._refusal = now + REMEMBERED_SECONDS, refusal
