"""Which row of the cross-attention's cache belongs to which source text. No torch.

A source keeps its row from the time it is seated until its sequence has ended, so that the encoder runs once for each.
All rows have the same width, which follows the longest source there is; rows times width never exceed the capacity.
What is decided here is written down as the cache's commands, as in `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine.rows import Command, Layout, Scrub

_NARROWEST = 64
"""Positions of a row to begin with."""


@dataclass(eq=False)
class Source:
    """The text that a sequence is generated from."""

    tokens: tuple[int, ...]
    row: int = -1
    """Of the cross-attention's cache; -1 without one."""


class SourceRows:
    """The books, for `capacity` positions in all and sources of at most `longest` tokens."""

    def __init__(self, *, capacity: int, longest: int) -> None:
        self.width = min(_NARROWEST, longest)
        self._capacity = capacity
        self._longest = longest
        self._seated: list[Source | None] = []
        """By row."""
        self._commands: list[Command] = []

    @property
    def count(self) -> int:
        """Rows of the present width."""
        return self._capacity // self.width

    def take_commands(self) -> list[Command]:
        """What the cache has to do before it is written to or read."""
        commands, self._commands = self._commands, []
        return commands

    def seat(self, source: Source) -> bool:
        """Gives a source a row, if there is room for it now."""
        sources = [other for other in self._seated if other is not None]
        width = self._width_for(max(len(other.tokens) for other in (*sources, source)))
        free = next((row for row, other in enumerate(self._seated) if other is None), len(self._seated))
        if width > self.width or free >= self.count:
            if width == self.width or len(sources) >= self._capacity // width:
                return False
            self._lay_out(width, sources)
            free = len(sources)
        self._seated[free : free + 1] = [source]
        source.row = free
        return True

    def leave(self, source: Source, *, spoiled: bool = False) -> None:
        """Takes a source's row from it; one that is `spoiled` (by a NaN) is zeroed, with all that nobody needs."""
        self._seated[source.row] = None
        source.row = -1
        while self._seated and self._seated[-1] is None:
            self._seated.pop()
        if spoiled:
            self._commands.append(Scrub(tuple(0 if s is None else len(s.tokens) for s in self._seated)))

    def _lay_out(self, width: int, sources: list[Source]) -> None:
        self.width = width
        kept = tuple((source.row, len(source.tokens)) for source in sources)
        self._commands.append(Layout(self.count, width, kept))
        self._seated = list(sources)
        for row, source in enumerate(sources):
            source.row = row

    def _width_for(self, length: int) -> int:
        width = min(_NARROWEST, self._longest)
        while width < length:
            width *= 2
        return min(width, self._longest)
