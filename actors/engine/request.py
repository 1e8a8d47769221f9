"""What the engine is asked and what it answers, and the text side of one request: stop strings across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from actors.engine.randomness import choice_seed
from configs.errors import GanymedeError, RequestError
from configs.schema.generation import Sampling

if TYPE_CHECKING:
    from actors.engine.adapters import Adapter

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `id` is the caller's, unique among the requests in flight."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    generated: tuple[int, ...] = ()
    """The first tokens of the answer, drawn before (by an engine that is gone): they are not given out again, and the
    ones after them are those that would have come."""
    spelt: frozenset[int] = frozenset()
    """Special tokens that the text holds by their names; the others it leaves out."""
    adapter: Adapter | None = None
    """Of the model, that writes the answer; the bare model does without one. Decoders on the lean forward pass only."""

    @property
    def writer(self) -> str:
        """Key of the adapter: keys and values are of use only to requests with the same one."""
        return "" if self.adapter is None else self.adapter.key

    def check(self, *, context_length: int, vocab: int) -> None:
        """Raises `RequestError` unless a model with this window and number of tokens can serve the request."""
        sampling = self.sampling
        room = context_length - (sampling.max_new_tokens > 0)
        if not self.prompt_ids:
            raise RequestError("the prompt is empty", param="prompt", allowed="at least one token")
        if len(self.prompt_ids) > room:
            raise RequestError(
                "the prompt leaves no room in the model's context window",
                param="prompt",
                received=f"{len(self.prompt_ids)} tokens",
                allowed=f"at most {room} tokens",
                next_step="shorten the prompt",
            )
        for param, ids in (
            ("prompt", self.prompt_ids),
            ("logit_bias", sampling.logit_bias),
            ("stop_token_ids", sampling.stop_token_ids),
            ("generated", self.generated),
        ):
            unknown = next((token for token in ids if not 0 <= token < vocab), None)
            if unknown is not None:
                raise RequestError(
                    f"{param} holds a token id the model does not know",
                    param=param,
                    received=unknown,
                    allowed=f"0 to {vocab - 1}",
                )

    def choices(self, count: int) -> list[Request]:
        """Requests for several answers, `id/0` and so on, each with a seed of its own; the first one's is this one's.

        What a choice says depends on its index, not on how many there are.
        """
        seed = self.sampling.seed
        return [
            replace(
                self,
                id=f"{self.id}/{index}",
                sampling=self.sampling.model_copy(update={"seed": choice_seed(seed, index)}),
            )
            for index in range(count)
        ]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token where it stands, before any control of the sampling."""

    token_id: int
    logprob: float
    """Natural logarithm of the probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there with theirs, as many as were asked for, likeliest first."""


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
    cached_tokens: int = 0
    """Tokens of the prompt that were not run, as their keys and values were in the cache."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a new token, if they were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """One a prompt token after the first; in the first event of a request that asked for them."""
    began: float | None = field(default=None, compare=False)
    """When the request was first given a place, seconds of `time.monotonic`; None if it needed none."""


@dataclass(frozen=True)
class Completion:
    """Everything that was generated for one request."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    finish_reason: FinishReason
    error: GanymedeError | None = None
    cached_tokens: int = field(default=0, compare=False)
    """Tokens of the prompt that were not run; depends on what ran before, so that it is no part of equality."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

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
            cached_tokens=last.cached_tokens,
            logprobs=tuple(entry for event in events for entry in event.logprobs),
            prompt_logprobs=next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None),
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
