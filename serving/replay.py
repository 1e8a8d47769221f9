"""What is left of a call whose replica went away: the prompts and the tokens given out say it all.

The tokens of an answer are a function of the model, the prompt, the settings and the seed; the number that decides a
draw is one of (seed, position). So another replica that is handed the prompt and the tokens so far goes on with the
tokens that would have come (up to the rounding of matrix products, which preemption inside an engine shares).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from serving.calls import Call, Piece

DELAYS_SECONDS = (0.0, 1.0, 2.0, 4.0)
"""Before each replay that follows another without a token in between: Ray Serve needs some seconds to notice a broken
replica, and a call that breaks every replica must not go on for ever."""


class Progress:
    """What has been given out of one call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._given: list[list[int] | None] = [[] for _ in range(call.answers)]
        self._digest: str | None = None
        self._losses = 0
        self._stalled = 0

    @property
    def complete(self) -> bool:
        """Whether all answers have ended."""
        return all(tokens is None for tokens in self._given)

    @property
    def tokens(self) -> int:
        """Given out so far in the answers that go on."""
        return sum(len(tokens or ()) for tokens in self._given)

    def note(self, batch: Sequence[Piece]) -> None:
        """Takes down what is handed to the client."""
        self._stalled = 0
        for piece in batch:
            self._digest = piece.model_digest
            given = self._given[piece.index] or []
            given.extend(piece.token_ids)
            self._given[piece.index] = None if piece.finish_reason is not None else given

    def lose(self) -> float | None:
        """Counts a lost replica; seconds to wait before the next one is asked, None once that is pointless."""
        self._losses += 1
        self._stalled += 1
        return DELAYS_SECONDS[self._stalled - 1] if self._stalled <= len(DELAYS_SECONDS) else None

    def rest(self) -> Call:
        """The call that gives out what is left."""
        call_id = f"{self._call.id}.{self._losses}" if self._losses else self._call.id
        if self._digest is None:
            return replace(self._call, id=call_id)
        begun = tuple(None if tokens is None else tuple(tokens) for tokens in self._given)
        return replace(self._call, id=call_id, begun=begun, begun_by=self._digest)
