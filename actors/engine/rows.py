"""Whose tokens each row of the cache holds. No torch.

Running sequences have the first rows, without a gap between steps, so that decoding reads them as one block. The rows
behind them keep what ended sequences left, until the room is needed: a prompt that begins like the tokens of some row
takes a copy of their keys and values instead of running them again.

All rows have the same width. It doubles when a sequence outgrows it, which leaves fewer rows, and the product never
exceeds the cache's capacity. What is decided here is written down as commands, which `cache.KVCache` carries out in
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

from actors.engine.sequence import Sequence

_NARROWEST = 32
"""Positions of a row to begin with."""
_WORTH_KEEPING = 8
"""Tokens; a shorter common beginning is run again."""
_MOST_KEPT = 256
"""Rows of ended sequences; bounds the search for a common beginning."""


@dataclass(frozen=True)
class Copy:
    """The first `length` positions of row `source` are to be copied to row `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Layout:
    """The cache is to be seen as `rows` rows of `width` positions; `kept` holds (old row, length) of the first ones."""

    rows: int
    width: int
    kept: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Scrub:
    """Everything is to be zeroed but the first positions of the first rows, as many as `lengths` says of each."""

    lengths: tuple[int, ...]


Command = Copy | Layout | Scrub


@dataclass
class _Left:
    """What an ended sequence left in its row."""

    tokens: Tokens[int]
    writer: str
    """`Request.writer` of the sequence: others' keys and values are no good for its tokens."""
    used: int
    """Number of the use, to tell the least recently used row."""


class Rows:
    """The books of the cache. Made for `capacity` positions in all and rows of at most `longest` positions."""

    def __init__(self, *, capacity: int, longest: int, max_running: int) -> None:
        self.width = min(_NARROWEST, longest)
        self._capacity = capacity
        self._longest = longest
        self._most_rows = max_running + _MOST_KEPT
        self._running: list[Sequence | None] = []
        """By row; None where a sequence has left since the last `settle`."""
        self._left: dict[int, _Left] = {}
        self._uses = 0
        self._commands: list[Command] = []

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a row, by row."""
        return [sequence for sequence in self._running if sequence is not None]

    @property
    def left(self) -> dict[int, Tokens[int]]:
        """Tokens of ended sequences, by the row that still holds them."""
        return {row: left.tokens for row, left in self._left.items()}

    @property
    def count(self) -> int:
        """Rows of the present width."""
        return self.count_at(self.width)

    def count_at(self, width: int) -> int:
        """Rows there are when each has `width` positions."""
        return min(self._capacity // width, self._most_rows)

    def width_for(self, length: int) -> int:
        """Width of rows that hold `length` tokens."""
        width = _NARROWEST
        while width < length:
            width *= 2
        return min(width, self._longest)

    def take_commands(self) -> list[Command]:
        """What the cache has to do before the next step runs."""
        commands, self._commands = self._commands, []
        return commands

    def lay_out(self, width: int) -> None:
        """Lays the rows out anew; those that were used last stay, as many as there is room for."""
        running = self.running
        room = self.count_at(width) - len(running)
        newest = sorted(self._left.items(), key=lambda item: -item[1].used)[:room]
        kept = [(sequence.row, sequence.cached) for sequence in running]
        kept += [(row, min(len(left.tokens), width)) for row, left in newest]
        self._commands.append(Layout(self.count_at(width), width, tuple(kept)))
        self.width = width
        self._running = list(running)
        for row, sequence in enumerate(running):
            sequence.row = row
        behind = enumerate(newest, start=len(running))
        self._left = {row: replace(left, tokens=left.tokens[:width]) for row, (_, left) in behind}

    def seat(self, sequence: Sequence) -> None:
        """Gives a sequence a row, with what other rows hold of its beginning. There must be a row that is free."""
        length, source = self._match(sequence)
        free = [row for row, other in enumerate(self._running) if other is None] or [len(self._running)]
        row = source if source in free else free[0]
        if row == len(self._running):
            self._running.append(None)
        if row == source:
            del self._left[row]
        else:
            self._set_aside(row, spared=source)
        self._running[row] = sequence
        sequence.row = row
        self._take(sequence, length, source)

    def reuse(self, sequence: Sequence) -> None:
        """Copies what another row holds of a sequence's tokens beyond those it has."""
        length, source = self._match(sequence)
        if length >= sequence.cached + _WORTH_KEEPING:
            self._take(sequence, length, source)

    def leader(self, sequence: Sequence) -> tuple[Sequence, int] | None:
        """An older sequence that is about to compute more of this one's tokens than any row has, and how many."""
        best, found = sequence.cached + _WORTH_KEEPING - 1, None
        for other in self.running:
            if other.arrival < sequence.arrival and other.request.writer == sequence.request.writer:
                length = _common(sequence.tokens, other.tokens, min(sequence.reusable, len(other.tokens)), best)
                if length > best and length > other.cached:
                    best, found = length, other
        return None if found is None else (found, best)

    def leave(self, sequence: Sequence) -> None:
        """Takes a sequence's row from it; what it holds stays of use for prompts that begin alike."""
        tokens = sequence.tokens[: sequence.cached]
        self._running[sequence.row] = None
        if len(tokens) >= _WORTH_KEEPING:
            # A row that this one continues has nothing to add.
            for row, other in list(self._left.items()):
                if other.writer == sequence.request.writer and other.tokens == tokens[: len(other.tokens)]:
                    del self._left[row]
            self._left[sequence.row] = _Left(tokens, sequence.request.writer, self._use())
        sequence.row = -1
        sequence.cached = 0

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence's row from it because what it holds is spoiled, and zeroes what no sequence needs.

        What spoiled it (a NaN) would spread from there, as attention multiplies what lies behind a row's end by 0.
        """
        self._running[sequence.row] = None
        sequence.row = -1
        sequence.cached = 0
        self._left.clear()
        self._commands.append(Scrub(tuple(0 if s is None else s.cached for s in self._running)))

    def settle(self) -> None:
        """Closes the gaps between the running sequences, each with the last of them."""
        alive = self.running
        for row in range(len(alive)):
            if self._running[row] is None:
                last = alive.pop()
                self._set_aside(row)
                self._commands.append(Copy(last.row, row, last.cached))
                self._running[row], self._running[last.row] = last, None
                last.row = row
        del self._running[len(self.running) :]

    def _match(self, sequence: Sequence) -> tuple[int, int]:
        """The longest beginning of a sequence's tokens that some row holds, and the row; (0, -1) if there is none."""
        best, found = _WORTH_KEEPING - 1, -1
        for row, tokens, cached in self._contents(sequence.request.writer):
            if row != sequence.row:
                length = _common(sequence.tokens, tokens, min(sequence.reusable, cached), best)
                if length > best:
                    best, found = length, row
        return (0, -1) if found < 0 else (best, found)

    def _contents(self, writer: str) -> Iterator[tuple[int, Tokens[int], int]]:
        """What rows hold that was computed with this adapter, or with none."""
        for row, left in self._left.items():
            if left.writer == writer:
                yield row, left.tokens, len(left.tokens)
        for sequence in self.running:
            if sequence.request.writer == writer:
                yield sequence.row, sequence.tokens, sequence.cached

    def _take(self, sequence: Sequence, length: int, source: int) -> None:
        if source >= 0 and source != sequence.row:
            self._commands.append(Copy(source, sequence.row, length))
            if source in self._left:
                self._left[source].used = self._use()
        sequence.cached = length
        if not sequence.completion_tokens:
            sequence.reused = length

    def _set_aside(self, row: int, spared: int = -1) -> None:
        """Moves what is left in a row behind the running ones, in place of what was used least recently."""
        left = self._left.pop(row, None)
        if left is None:
            return
        behind = range(len(self._running), self.count)
        unused = next((r for r in behind if r not in self._left), None)
        if unused is None:
            kept = [r for r in behind if r != spared]
            unused = min(kept, key=lambda r: self._left[r].used, default=None)
            if unused is None or self._left[unused].used > left.used:
                return
        self._commands.append(Copy(row, unused, len(left.tokens)))
        self._left[unused] = left

    def _use(self) -> int:
        self._uses += 1
        return self._uses


def _common(a: Tokens[int], b: Tokens[int], limit: int, beyond: int) -> int:
    """How many of the first `limit` tokens are the same; anything up to `beyond` if no more than that are."""
    if limit <= beyond or a[: beyond + 1] != b[: beyond + 1]:
        return min(limit, beyond)
    if a[:limit] == b[:limit]:
        return limit
    return next(n for n in range(beyond + 1, limit) if a[n] != b[n])
