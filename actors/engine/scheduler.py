"""Which sequences run in the next step, and in which slot of the cache each one lives. No torch.

A sequence's slot is its index in `running`. All but the last of them have their prompt in the cache and decode one
token a step, so that decoding reads the slots 0 to n as one block; the last may be part way through its prompt.
To keep the block whole, a slot that falls free is filled from the end, and the caller moves the cache rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from actors.engine.sequence import Sequence
from configs.errors import OverloadedError


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence, to be run in this step: the first stands at position `start`."""

    slot: int
    start: int
    tokens: Tokens[int]

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Turn:
    """A sequence's part in a step."""

    sequence: Sequence
    span: Span

    @property
    def completes(self) -> bool:
        """Whether the step gives this sequence its next token."""
        return self.span.stop == len(self.sequence.tokens)


@dataclass(frozen=True)
class Move:
    """The first `length` positions of slot `source` are to be copied to slot `target`."""

    source: int
    target: int
    length: int


class Scheduler:
    """First come, first served; a step holds every decoding sequence and at most `prefill_tokens` of prompts.

    Invariant after each call: every sequence in `running` but the last has all but its newest token in the cache.
    """

    def __init__(self, *, max_sequences: int, max_queued: int, prefill_tokens: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_sequences = max_sequences
        self._max_queued = max_queued
        self._prefill_tokens = prefill_tokens

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence, *, bounded: bool = True) -> None:
        """Queues a sequence; raises `OverloadedError` if it is `bounded` and the queue is full.

        Sequences that the next step takes from the queue do not count towards its bound.
        """
        free_slots = self._max_sequences - len(self.running)
        if bounded and len(self.waiting) >= free_slots + self._max_queued:
            raise OverloadedError(
                "the request queue is full",
                received=f"{len(self.waiting)} requests waiting, {len(self.running)} running",
                allowed=f"{self._max_queued} waiting",
                next_step="try again later, or raise max_queued or the number of replicas",
            )
        self.waiting.append(sequence)

    def schedule(self) -> list[Turn]:
        """The next step, by slot: first the decoding sequences, then chunks of prompts."""
        turns: list[Turn] = []
        budget = self._prefill_tokens
        for slot, sequence in enumerate(self.running):
            missing = len(sequence.tokens) - sequence.cached
            if missing > 1:
                missing = min(missing, budget)
                budget -= missing
            turns.append(_turn(sequence, slot, missing))
        while budget > 0 and self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting.popleft()
            count = min(len(sequence.tokens), budget)
            budget -= count
            turns.append(_turn(sequence, len(self.running), count))
            self.running.append(sequence)
        return turns

    def remove(self, ended: Collection[Sequence]) -> list[Move]:
        """Forgets sequences, waiting or running; returns the moves that close the gaps, to be made in order."""
        gone = set(map(id, ended))
        self.waiting = deque(s for s in self.waiting if id(s) not in gone)
        running = self.running
        partial_slot = len(running) - 1
        partial = running.pop() if running and len(running[-1].tokens) - running[-1].cached > 1 else None
        alive = [slot for slot, sequence in enumerate(running) if id(sequence) not in gone]
        kept = len(alive)
        holes = sorted(set(range(kept)).difference(alive))
        sources = alive[kept - len(holes) :]
        moves = [Move(s, hole, running[s].cached) for s, hole in zip(sources, holes, strict=True)]
        for move in moves:
            running[move.target] = running[move.source]
        del running[kept:]
        if partial is not None and id(partial) not in gone:
            if partial_slot != kept:
                moves.append(Move(partial_slot, kept, partial.cached))
            running.append(partial)
        return moves


def _turn(sequence: Sequence, slot: int, count: int) -> Turn:
    start = sequence.cached
    return Turn(sequence, Span(slot, start, sequence.tokens[start : start + count]))
