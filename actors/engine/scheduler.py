"""Which sequences run in the next step, and with how many tokens. No torch.

First come, first served: a sequence starts only after all that came before it, and when the cache is full the youngest
one gives up its row, keeps its tokens, and goes on once there is room. So the oldest one always runs and nothing
starves. A step holds one token of every decoding sequence, and chunks of prompts up to a budget.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.engine.rows import Command, Rows
from actors.engine.sequence import Sequence
from configs.errors import OverloadedError

if TYPE_CHECKING:
    from actors.engine.adapters import Adapter

_MOST_FILLING = 8
"""Sequences part way through their prompts: enough to find short ones among them; decoding reads past their rows."""
_PREFILL_SHARE = 1.5
"""Prompt tokens that a step may run beside each decoding sequence, over those it may run beside none: a step costs as
much as some tokens do, which is `mixed_prefill_tokens` over this, plus the tokens that it runs. So prompts delay those
that decode by one and a half times a step's own time, whatever their number."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence, to be run in this step: the first stands at position `start`."""

    row: int
    start: int
    tokens: Tokens[int]
    adapter: Adapter | None = None
    """That they are run with."""

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
class Step:
    """What is to be done to the cache, and then what is to be run: decoding sequences by row, then longer spans."""

    commands: list[Command]
    turns: list[Turn]


class Scheduler:
    """Decides what each step holds.

    Args of the constructor:
        cache_tokens: positions of the cache.
        longest: tokens of the longest sequence there can be; no more than `cache_tokens`.
        max_sequences: sequences that run together at most.
        max_queued: sequences that may wait beyond those that the next step starts.
        prefill_tokens: prompt tokens a step runs at most.
        mixed_prefill_tokens: the same while sequences decode, which wait for it, but for what there is beside each.
    """

    def __init__(
        self,
        *,
        cache_tokens: int,
        longest: int,
        max_sequences: int,
        max_queued: int,
        prefill_tokens: int,
        mixed_prefill_tokens: int,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.rows = Rows(capacity=cache_tokens, longest=longest, max_running=max_sequences)
        self.preemptions = 0
        """Times a running sequence had to give up its row."""
        self._max_sequences = max_sequences
        self._max_queued = max_queued
        self._prefill_tokens = prefill_tokens
        self._mixed_prefill_tokens = mixed_prefill_tokens
        self._arrivals = 0
        self._led: dict[Sequence, tuple[Sequence, int]] = {}
        """Sequences that wait for an older one to compute the tokens they share, and how many these are."""

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a row of the cache, by row."""
        return self.rows.running

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.rows.running)

    def add(self, sequence: Sequence, *, bounded: bool = True) -> None:
        """Queues a sequence; raises `OverloadedError` if it is `bounded` and the queue is full.

        Sequences that the next step takes from the queue do not count towards its bound.
        """
        free = self._max_sequences - len(self.running)
        if bounded and len(self.waiting) >= free + self._max_queued:
            raise OverloadedError(
                "the request queue is full",
                received=f"{len(self.waiting)} requests waiting, {len(self.running)} running",
                allowed=f"{self._max_queued} waiting",
                next_step="try again later, or raise max_queued or the number of replicas",
            )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step. The caller sets `cached` of each sequence to its span's `stop` once that has run."""
        self._make_room()
        self._admit()
        self.rows.settle()
        self._catch_up()
        turns = self._turns()
        return Step(self.rows.take_commands(), turns)

    def remove(self, ended: Collection[Sequence]) -> None:
        """Forgets sequences, waiting or running; what running ones leave in the cache may be used again."""
        gone = set(ended)
        self.waiting = deque(sequence for sequence in self.waiting if sequence not in gone)
        for sequence in self.running:
            if sequence in gone:
                self._leave(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Forgets a running sequence and everything that it left in the cache."""
        self._led.pop(sequence, None)
        self.rows.discard(sequence)

    def _make_room(self) -> None:
        """Widens the rows if a sequence has outgrown them; the youngest ones leave while there are too few."""
        while running := self.running:
            width = self.rows.width_for(max(len(sequence.tokens) for sequence in running))
            if width <= self.rows.width:
                return
            if self.rows.count_at(width) >= len(running):
                self.rows.lay_out(width)
                return
            youngest = max(running, key=lambda sequence: sequence.arrival)
            self._leave(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1

    def _admit(self) -> None:
        """Gives rows to those that wait, as long as there are rows and not many prompts are unfinished."""
        running = self.running
        filling = sum(_missing(s) > 1 and s not in self._led for s in running)
        while (
            self.waiting
            and len(running) < self._max_sequences
            and filling < _MOST_FILLING
            and self._has_row_for(self.waiting[0], running)
        ):
            sequence = self.waiting.popleft()
            self.rows.seat(sequence)
            if sequence.began is None:
                sequence.began = time.monotonic()
            running.append(sequence)
            self._follow(sequence)
            filling += sequence not in self._led

    def _has_row_for(self, sequence: Sequence, running: Tokens[Sequence]) -> bool:
        """Whether one more sequence has a row, once the rows have been laid out for it."""
        rows, count = self.rows, len(running) + 1
        longest = max(len(s.tokens) for s in (*running, sequence))
        if longest <= rows.width and count <= rows.count:
            return True
        # Narrower rows have to leave space to grow, or the sequence would soon be driven out again.
        width = max(rows.width_for(longest), min(rows.width, rows.width_for(longest + longest // 4)))
        if width == rows.width or count > rows.count_at(width):
            return False
        rows.lay_out(width)
        return True

    def _follow(self, sequence: Sequence) -> None:
        leader = self.rows.leader(sequence)
        if leader is not None:
            self._led[sequence] = leader

    def _catch_up(self) -> None:
        """Copies what those that were waited for have computed."""
        for sequence, (leader, length) in list(self._led.items()):
            if leader.row < 0 or leader.cached >= length:
                del self._led[sequence]
                self.rows.reuse(sequence)
                self._follow(sequence)

    def _turns(self) -> list[Turn]:
        ready = [sequence for sequence in self.running if sequence not in self._led]
        decoding = [sequence for sequence in ready if _missing(sequence) == 1]
        filling = sorted((s for s in ready if _missing(s) > 1), key=lambda s: s.arrival)
        shares = _shares([_missing(s) for s in filling], self._budget(len(decoding))) if filling else []
        return [_turn(s, 1) for s in decoding] + [
            _turn(s, share) for s, share in zip(filling, shares, strict=True) if share
        ]

    def _budget(self, decoding: int) -> int:
        if not decoding:
            return self._prefill_tokens
        return min(self._prefill_tokens, self._mixed_prefill_tokens + int(_PREFILL_SHARE * decoding))

    def _leave(self, sequence: Sequence) -> None:
        self._led.pop(sequence, None)
        self.rows.leave(sequence)


def _missing(sequence: Sequence) -> int:
    return len(sequence.tokens) - sequence.cached


def _shares(missing: Tokens[int], budget: int) -> list[int]:
    """Half of a budget for the oldest, which never starves then; the rest for those that need least to begin."""
    shares = [0] * len(missing)
    by_need = sorted(range(1, len(missing)), key=lambda index: missing[index])
    for index, most in [(0, budget - budget // 2), *((index, budget) for index in (*by_need, 0))]:
        more = min(missing[index] - shares[index], most, budget)
        shares[index] += more
        budget -= more
    return shares


def _turn(sequence: Sequence, count: int) -> Turn:
    start = sequence.cached
    return Turn(sequence, Span(sequence.row, start, sequence.tokens[start : start + count], sequence.request.adapter))
