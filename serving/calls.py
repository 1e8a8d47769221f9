"""What passes between the ingress and an engine replica: a call, its pieces of text, and why a call was refused.

Everything here is small, picklable and free of torch, Ray and FastAPI. A refusal travels as a value, not as an
exception: Ray wraps exceptions that cross processes, and what the client is to be told would be lost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from configs.errors import GanymedeError, InputError, OverloadedError, RequestError
from configs.schema.generation import Sampling

RETRY_AFTER_SECONDS = 1
"""What a client is told to wait when the queue is full."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ServedModel:
    """The immutable model version behind an endpoint."""

    name: str
    """What clients send as `model`."""
    folder: str
    """Local path of the model artifact."""
    ref: str
    """The artifact, `kind/name@version`."""
    digest: str
    version: int | None = None
    """Version in the registry; None for an artifact that was served by its reference."""
    alias: str | None = None
    """The alias it was resolved from."""
    created: int = 0
    """When it was resolved, seconds since the epoch."""

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of every answer: equal fingerprints mean equal weights and tokenizer."""
        return f"fp_{self.digest[:16]}"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that the assistant's next one is to follow."""

    messages: tuple[Message, ...]


Prompt = str | tuple[int, ...] | Conversation
"""A text, token ids, or a conversation."""


@dataclass(frozen=True)
class Call:
    """One HTTP request, validated: prompts to be continued."""

    id: str
    prompts: tuple[Prompt, ...]
    """Each gets answers of its own."""
    sampling: Sampling = Sampling()
    """Of each answer; the replica sets `max_new_tokens` and `seed`."""
    max_new_tokens: int | None = None
    """None: until the context window is full."""
    seed: int | None = None
    """None: another random seed for each prompt."""
    choices: int = 1
    """Answers to each prompt; those to the first prompt come first."""
    echo: bool = False
    """An answer begins with its prompt."""
    report_sampling: bool = False
    """An answer's last piece says how it was sampled."""
    whole: bool = False
    """All answers in one batch, once they are complete, instead of piece by piece."""


@dataclass(frozen=True)
class TokenScore:
    """How likely the model found a token of an answer, or of the prompt that it echoes."""

    token: bytes
    """Its own bytes; they may be part of a character."""
    offset: int
    """Where in the answer it begins, in characters."""
    logprob: float | None
    """None for the first token of a prompt, which nothing precedes."""
    top: tuple[tuple[bytes, float], ...] = ()
    """The likeliest tokens there, likeliest first."""


@dataclass(frozen=True)
class Piece:
    """What was added to the answer at `index`; the last piece of an answer carries its `finish_reason`."""

    index: int
    text: str
    prompt_tokens: int
    completion_tokens: int
    """Tokens of the answer so far."""
    finish_reason: FinishReason | None = None
    scores: tuple[TokenScore, ...] | None = None
    """Of the tokens in this piece; None if they were not asked for."""
    sampling: Sampling | None = None
    """How the answer was sampled, in its last piece if it was asked for."""

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        """One piece that says as much as some consecutive ones of the same answer."""
        last = pieces[-1]
        scores = None if last.scores is None else tuple(s for piece in pieces for s in piece.scores or ())
        return replace(last, text="".join(piece.text for piece in pieces), scores=scores)


@dataclass(frozen=True)
class Refusal:
    """Why a call is not, or no longer, served, as the client is told."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_seconds: int | None = None

    @classmethod
    def of(cls, error: GanymedeError) -> Refusal:
        """Bad input is 400, a full queue 503, everything else 500."""
        if isinstance(error, OverloadedError):
            return cls(503, str(error), error.code, retry_after_seconds=RETRY_AFTER_SECONDS)
        status = 400 if isinstance(error, InputError) else 500
        return cls(status, str(error), error.code, error.param if isinstance(error, RequestError) else None)


@dataclass(frozen=True)
class ReplicaStatus:
    """What a replica says of itself."""

    digest: str
    """Of the model it holds; during an update that may be the one before."""
    healthy: bool
    """Its engine is loaded and takes steps."""
    context_length: int
    chat: bool
    """Whether the model has a chat template."""


@dataclass(frozen=True)
class Tokens:
    """Token ids, and how many the model can take."""

    ids: tuple[int, ...]
    context_length: int


class Generator(Protocol):
    """Whoever answers calls: an engine replica, or a handle to one."""

    def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The pieces in batches; a refusal is the last thing given. Closing the iterator early cancels the call."""
        ...

    async def tokenize(self, prompt: Prompt) -> Tokens | Refusal:
        """The token ids that a text or a conversation becomes; ids stay what they are."""
        ...

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Refusal:
        """The text of token ids, special tokens left out."""
        ...

    async def status(self) -> ReplicaStatus:
        """How the replica is."""
        ...
