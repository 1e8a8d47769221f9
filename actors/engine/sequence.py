"""One request in flight: its tokens, and what of them may be shown. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from actors.engine.request import FinishReason, Request, StopStrings, TokenEvent, TokenLogprob
from actors.text import StreamDecoder, Text
from configs.errors import GanymedeError, RequestError

if TYPE_CHECKING:
    from actors.engine.grammars import Matcher


@dataclass(eq=False)
class Sequence:
    """What is known of a request in flight. The scheduler owns `cached`, `row`,
    `arrival`, `began` and `reused`; the rest changes by the methods alone.
    """

    request: Request
    decoder: StreamDecoder
    stops: StopStrings
    stop_ids: frozenset[int]
    max_tokens: int
    """Prompt and completion together end at this many tokens."""
    matcher: Matcher | None = None
    """Follows the text through the structure it has to have."""
    tokens: list[int] = field(init=False)
    """Prompt, then what was generated."""
    cached: int = 0
    """Tokens whose keys and values are in the cache."""
    row: int = -1
    """The row of the cache they are in; -1 while there is none."""
    arrival: int = 0
    """How many sequences came before."""
    began: float | None = None
    """When it was first given a place, seconds of `time.monotonic`; None while it waits for that."""
    reused: int = 0
    """Tokens whose keys and values were copied from another sequence's row."""
    _prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @classmethod
    def start(cls, request: Request, text: Text, *, context_length: int, matcher: Matcher | None) -> Self:
        """A request's state before its first step. Raises `RequestError` if what was generated is a whole answer."""
        sampling = request.sampling
        sequence = cls(
            request,
            decoder=text.stream_decoder(request.spelt),
            stops=StopStrings(sampling.stop),
            stop_ids=text.eos_token_ids.union(sampling.stop_token_ids),
            max_tokens=min(len(request.prompt_ids) + sampling.max_new_tokens, context_length),
            matcher=matcher,
        )
        for token in request.generated:
            if sequence.advance(token).finish_reason is not None:
                raise RequestError("the answer has ended already", param="generated")
        return sequence

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def generates(self) -> bool:
        """Whether the request asks for tokens, and not for its prompt's log-probabilities alone."""
        return self.request.sampling.max_new_tokens > 0

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's logits are still needed, so that each of its tokens has to be run."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and len(self._prompt_logprobs) < self.prompt_tokens - 1

    @property
    def reusable(self) -> int:
        """Leading tokens that need not be run if another row holds their keys and values."""
        return 0 if self.scores_prompt else len(self.tokens) - 1

    @property
    def may_stop(self) -> bool:
        """Whether the next token may be the last by the request's own choice of stops."""
        return self.completion_tokens >= self.request.sampling.min_tokens

    def record_prompt(self, position: int, entries: Items[TokenLogprob]) -> None:
        """Keeps log-probabilities of prompt tokens from `position` on, for the first event; replaces later ones."""
        self._prompt_logprobs[position - 1 :] = entries

    def advance(self, token: int, logprob: TokenLogprob | None = None) -> TokenEvent:
        """Adds a token, and decides whether it is the last and what text may be shown.

        Raises `EngineError` if the structure that the text has to have does not allow it.
        """
        watched = self.may_stop
        at_stop_id = watched and token in self.stop_ids
        if self.matcher is not None:
            self.matcher.accept(token)
        self.tokens.append(token)
        text, at_stop_string = "" if at_stop_id else self.decoder.push(token), False
        if watched:
            text, at_stop_string = self.stops.push(text)
        full = len(self.tokens) >= self.max_tokens
        complete = at_stop_id or (self.matcher is not None and self.matcher.complete)
        if (complete or full) and not at_stop_string:
            tail = self.decoder.flush()
            if watched:
                tail, at_stop_string = self.stops.push(tail)
            text += tail + self.stops.flush()
        reason: FinishReason | None = "stop" if complete or at_stop_string else "length" if full else None
        return self._event(text, reason, token_ids=(token,), logprobs=() if logprob is None else (logprob,))

    def end(self) -> TokenEvent:
        """The only event of a request that asks for no tokens."""
        return self._event("", "length")

    def fail(self, error: GanymedeError) -> TokenEvent:
        """The last event of a request that cannot go on."""
        return self._event("", "error", error=error)

    def _event(
        self,
        text: str,
        reason: FinishReason | None,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: GanymedeError | None = None,
    ) -> TokenEvent:
        is_first = self.completion_tokens == len(token_ids)
        scored = self.request.sampling.prompt_logprobs is not None and is_first and error is None
        return TokenEvent(
            request_id=self.request.id,
            token_ids=token_ids,
            text=text,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            finish_reason=reason,
            error=error,
            cached_tokens=self.reused,
            began=self.began,
            logprobs=logprobs,
            prompt_logprobs=tuple(self._prompt_logprobs) if scored else None,
        )
