"""What the engine is asked and what it answers, and the text side of one request: stop strings across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from configs.errors import GanymedeError
from configs.schema.generation import Sampling

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `id` is the caller's, unique among the requests in flight."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class TokenEvent:
    """What one step added to one request; the last one of a request carries its `finish_reason`."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, a stop token included."""
    text: str
    """Text that is certain: no part of a character, nothing that may turn out to begin a stop string."""
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated so far, these included."""
    finish_reason: FinishReason | None = None
    error: GanymedeError | None = None
    """Set if and only if `finish_reason` is `error`."""


@dataclass(frozen=True)
class Completion:
    """Everything that was generated for one request."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    finish_reason: FinishReason
    error: GanymedeError | None = None

    @classmethod
    def of(cls, events: Sequence[TokenEvent]) -> Completion:
        """Joins all events of one request, in order; the last must carry the `finish_reason`."""
        last = events[-1]
        if last.finish_reason is None:
            raise ValueError(f"request {last.request_id} has not finished")
        return cls(
            request_id=last.request_id,
            token_ids=tuple(token for event in events for token in event.token_ids),
            text="".join(event.text for event in events),
            prompt_tokens=last.prompt_tokens,
            finish_reason=last.finish_reason,
            error=last.error,
        )


class StopStrings:
    """Cuts a growing text before the first of some strings and holds back what may become one.

    The first string to be complete wins, so where token borders fall changes nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, delta: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string was reached (nothing may be pushed after that)."""
        if not self._stops:
            return delta, False
        text = self._held + delta
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(self._possible_start(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What is held, once it is certain that no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _possible_start(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
