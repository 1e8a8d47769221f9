"""One request in flight: its tokens, and what of them may be shown. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from actors.engine.request import FinishReason, Request, StopStrings, TokenEvent
from actors.text import StreamDecoder, Text
from configs.errors import GanymedeError


@dataclass(eq=False)
class Sequence:
    """What is known of a request in flight. The scheduler owns `cached`; everything else changes in `advance` alone."""

    request: Request
    decoder: StreamDecoder
    stops: StopStrings
    stop_ids: frozenset[int]
    max_tokens: int
    """Prompt and completion together end at this many tokens."""
    tokens: list[int] = field(init=False)
    """Prompt, then what was generated."""
    cached: int = 0
    """Tokens whose keys and values are in the cache."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @classmethod
    def start(cls, request: Request, text: Text, *, context_length: int) -> Self:
        """A request's state before its first step."""
        sampling = request.sampling
        return cls(
            request,
            decoder=text.stream_decoder(),
            stops=StopStrings(sampling.stop),
            stop_ids=text.eos_token_ids.union(sampling.stop_token_ids),
            max_tokens=min(len(request.prompt_ids) + sampling.max_new_tokens, context_length),
        )

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def advance(self, token: int) -> TokenEvent:
        """Adds a token, and decides whether it is the last and what text may be shown."""
        self.tokens.append(token)
        at_stop_id = token in self.stop_ids
        text, at_stop_string = self.stops.push("" if at_stop_id else self.decoder.push(token))
        full = len(self.tokens) >= self.max_tokens
        if (at_stop_id or full) and not at_stop_string:
            tail, at_stop_string = self.stops.push(self.decoder.flush())
            text += tail + self.stops.flush()
        reason: FinishReason | None = "stop" if at_stop_id or at_stop_string else "length" if full else None
        return self._event((token,), text, reason)

    def end(self) -> TokenEvent:
        """The only event of a request that asks for no tokens."""
        return self._event((), "", "length")

    def fail(self, error: GanymedeError) -> TokenEvent:
        """The last event of a request that cannot go on."""
        return self._event((), "", "error", error)

    def _event(
        self, token_ids: tuple[int, ...], text: str, reason: FinishReason | None, error: GanymedeError | None = None
    ) -> TokenEvent:
        return TokenEvent(self.request.id, token_ids, text, self.prompt_tokens, self.completion_tokens, reason, error)
