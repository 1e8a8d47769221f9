"""What passes between the ingress and an engine replica: a call, its pieces of text, and why a call was refused.

Everything here is small, picklable and free of torch, Ray and FastAPI. A refusal travels as a value, not as an
exception: Ray wraps exceptions that cross processes, and what the client is to be told would be lost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from configs.errors import GanymedeError, InputError, OverloadedError, RequestError

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
class Call:
    """One HTTP request, validated: prompts to be continued, or a conversation."""

    id: str
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts or token ids; each gets an answer of its own."""
    messages: tuple[Message, ...] = ()
    """A conversation to be continued; excludes `prompts`."""
    max_new_tokens: int | None = None
    """None: until the context window is full."""
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    """None: another random seed for each prompt."""
    whole: bool = False
    """All answers in one batch, once they are complete, instead of piece by piece."""


@dataclass(frozen=True)
class Piece:
    """What was added to the answer at `index`; the last piece of an answer carries its `finish_reason`."""

    index: int
    text: str
    prompt_tokens: int
    completion_tokens: int
    """Tokens of the answer so far."""
    finish_reason: FinishReason | None = None


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


class Generator(Protocol):
    """Whoever answers calls: an engine replica, or a handle to one."""

    def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The pieces in batches; a refusal is the last thing given. Closing the iterator early cancels the call."""
        ...

    async def status(self) -> ReplicaStatus:
        """How the replica is."""
        ...
