"""What passes between the ingress and an engine replica: a call, what comes of it, and why a call was refused.

Everything here is small, picklable and free of torch, Ray and FastAPI. A refusal travels as a value, not as an
exception: Ray wraps exceptions that cross processes, and what the client is to be told would be lost.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal, Protocol

from actors.engine.encodings import Encoding
from actors.tools import Convention, Function, ToolUse
from configs.errors import GanymedeError, InputError, OverloadedError, RequestError
from configs.schema.generation import Sampling
from configs.schema.serving import ModelSettings

RETRY_AFTER_SECONDS = 1
"""What a client is told to wait when the queue is full."""

LOST = "replica_unavailable"
"""Code of a refusal by a replica that can serve no more: another one is to be asked."""

FinishReason = Literal["stop", "length"]
Capability = Literal["completions", "chat", "embeddings", "classify", "ner", "score"]
ROUTES: dict[Capability, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
    "classify": "/v1/classify",
    "ner": "/v1/ner",
    "score": "/v1/score",
}
"""Where a model is asked for what it can do."""


@dataclass(frozen=True)
class Ancestor:
    """An artifact that a model was made from, or that was made from the model."""

    ref: str
    digest: str
    run: str | None
    """MLflow run that made it; None where there was none, or where the artifact is no longer in the store."""


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from and how it was judged."""

    run: str | None = None
    """MLflow run that made the model."""
    made_from: tuple[Ancestor, ...] = ()
    """Models, corpora, examples and tokenizers, down to the first ones."""
    reports: tuple[Ancestor, ...] = ()
    """Evaluations of this very content."""


@dataclass(frozen=True)
class AdapterSource:
    """A published adapter, which the replicas of its base load when it is first asked for."""

    ref: str
    """The artifact, `kind/name@version`."""
    folder: str
    """Local path of the artifact."""
    digest: str
    """Of the artifact."""
    base: str
    """Digest of the model that it adapts."""

    @property
    def key(self) -> str:
        """Digest of base and adapter together: of what they write."""
        return blake2b(f"{self.base}/{self.digest}".encode(), digest_size=32).hexdigest()


@dataclass(frozen=True)
class ServedModel:
    """An immutable model version behind an endpoint."""

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
    lineage: Lineage = Lineage()
    canary: ServedModel | None = None
    """Another version, which gets a share of the requests."""
    adapters: tuple[ServedModel, ...] = ()
    """What the replicas of this version write too, each under a name of its own."""
    adapter: AdapterSource | None = None
    """Of a model that is an adapter over another one; `digest` is its key then."""
    parent: str | None = None
    """Name of that other one."""

    @property
    def versions(self) -> tuple[ServedModel, ...]:
        """This one, and the canary if there is one."""
        return (self,) if self.canary is None else (self, self.canary)

    @property
    def replicated(self) -> ServedModel:
        """What a replica has to know of it; all that may change around it is left out."""
        return replace(self, canary=None, adapters=())


@dataclass(frozen=True)
class Offer:
    """A model and how it is served."""

    model: ServedModel
    settings: ModelSettings


def fingerprint(digest: str) -> str:
    """`system_fingerprint` of an answer by the model with this digest: equal ones mean equal weights and tokenizer."""
    return f"fp_{digest[:16]}"


@dataclass(frozen=True)
class PastCall:
    """A call of a function that the assistant made before."""

    id: str
    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    calls: tuple[PastCall, ...] = ()
    """Of the assistant."""
    call_id: str | None = None
    """Of the call whose result this is."""
    call_name: str | None = None
    """The function that was called there."""

    @property
    def rendered(self) -> dict[str, Any]:
        """What a chat template gets; only what is there."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            turn["tool_calls"] = [
                {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                for c in self.calls
            ]
        return turn if self.call_id is None else {**turn, "tool_call_id": self.call_id, "name": self.call_name}


@dataclass(frozen=True)
class Conversation:
    """Turns that the assistant's next one is to follow."""

    messages: tuple[Message, ...]
    tools: tuple[Function, ...] = ()
    """What is offered there."""


Prompt = str | tuple[int, ...] | Conversation
"""A text, token ids, or a conversation."""


_LONG = 1 << 15


def is_long(prompts: Sequence[Prompt]) -> bool:
    """Whether prompts take so long to encode (more than some 30 ms) that the event loop has to go on meanwhile."""
    texts = [p for p in prompts if isinstance(p, str)]
    texts += [m.content for p in prompts if isinstance(p, Conversation) for m in p.messages if m.content]
    return sum(map(len, texts)) >= _LONG


@dataclass(frozen=True)
class Call:
    """One HTTP request, validated: prompts to be continued."""

    id: str
    prompts: tuple[Prompt, ...]
    """Each gets answers of its own."""
    seeds: tuple[int, ...]
    """One a prompt, for its first answer; they and the model decide every token that is drawn."""
    sampling: Sampling = Sampling()
    """Of each answer; the replica sets `max_new_tokens` and `seed`."""
    max_new_tokens: int | None = None
    """None: until the context window is full."""
    choices: int = 1
    """Answers to each prompt; those to the first prompt come first."""
    echo: bool = False
    """An answer begins with its prompt."""
    report_sampling: bool = False
    """An answer's last piece says how it was sampled."""
    report_timing: bool = False
    """Pieces say where the replica's time went."""
    whole: bool = False
    """All answers in one batch, once they are complete, instead of piece by piece."""
    begun: tuple[tuple[int, ...] | None, ...] | None = None
    """For a call that goes on with answers of a replica that is gone: the tokens each has given out, None for an answer
    that has ended."""
    begun_by: str | None = None
    """Digest of the model that wrote them; no other can go on."""
    tool_use: ToolUse | None = None
    """What the answers may call; None for texts alone."""
    asker: str = ""
    """Who asks, or the request itself; decides which of two versions of a model answers."""
    adapter: AdapterSource | None = None
    """That writes the answers, over the replica's model; None for the model itself."""

    @property
    def answers(self) -> int:
        """How many there are to be."""
        return len(self.prompts) * self.choices


ReadTask = Literal["embeddings", "classify", "ner", "score"]


@dataclass(frozen=True)
class ReadCall:
    """One HTTP request, validated: texts to be read."""

    id: str
    task: ReadTask
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None = None
    """For each text a second one, to be judged together with it."""
    truncate: bool = False
    """Whether a text longer than the model's window is cut; it is refused otherwise."""
    normalize: bool = True
    """Whether embeddings get length 1."""
    asker: str = ""
    """As of a `Call`."""


@dataclass(frozen=True)
class Spent:
    """Where a replica's time with one answer went, in seconds."""

    queue: float = 0.0
    """From the call's arrival until the engine gave the answer a place; encoding the prompt is in it."""
    prefill: float = 0.0
    """From then until the first token, or until all that was to be read was."""
    decode: float = 0.0
    """From the first token on."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.queue + self.prefill + self.decode

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.queue + other.queue, self.prefill + other.prefill, self.decode + other.decode)


@dataclass(frozen=True)
class Readings:
    """What comes of a `ReadCall`: an encoding a text, or, for `score`, a number a pair."""

    encodings: tuple[Encoding, ...]
    scores: tuple[float, ...]
    prompt_tokens: int
    """Tokens read, in all."""
    model_digest: str
    spent: Spent = field(default=Spent(), compare=False)
    """Of the text that was read last."""


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
    model_digest: str = ""
    """Of the model that wrote it; during an update it may be the one before."""
    token_ids: tuple[int, ...] = ()
    """The tokens behind it: with them another replica can go on."""
    convention: Convention | None = None
    """How calls are written in the text, if there may be any."""
    spent: Spent | None = field(default=None, compare=False)
    """The replica's time since the piece before, if it was asked for."""

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        """One piece that says as much as some consecutive ones of the same answer."""
        last = pieces[-1]
        if len(pieces) == 1:
            return last
        scores = None if last.scores is None else tuple(s for piece in pieces for s in piece.scores or ())
        ids = tuple(token for piece in pieces for token in piece.token_ids)
        spent = None if last.spent is None else sum((piece.spent or Spent() for piece in pieces), Spent())
        text = "".join(piece.text for piece in pieces)
        return replace(last, text=text, token_ids=ids, scores=scores, spent=spent)


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

    @classmethod
    def incapable(cls, wanted: Capability, can: Sequence[Capability]) -> Refusal:
        """The model is of another kind than the route."""
        allowed = ", ".join(ROUTES[each] for each in can)
        message = f"this model does not answer {ROUTES[wanted]}; allowed: {allowed}"
        return cls(400, message, "unsupported_by_model", "model")


UNAVAILABLE = Refusal(503, "no engine replica can be asked now", "unavailable", retry_after_seconds=RETRY_AFTER_SECONDS)


@dataclass(frozen=True)
class ReplicaStatus:
    """What a replica says of itself."""

    digest: str
    """Of the model it holds; during an update that may be the one before."""
    healthy: bool
    """Its engine is loaded and takes steps."""
    context_length: int
    capabilities: tuple[Capability, ...]
    labels: tuple[str, ...] = ()
    """Of a model that classifies or labels words."""


@dataclass(frozen=True)
class LoadReport:
    """The work of one engine at one moment."""

    waiting: int = 0
    """Requests that have no token yet: queued, or their prompts being read."""
    waiting_tokens: int = 0
    """Prompt tokens of those."""
    running: int = 0
    """Requests whose answers are being written."""
    running_tokens: int = 0
    """Prompt and answer tokens of those; their keys and values are held."""
    capacity_tokens: int = 0
    """Tokens whose keys and values can be held; 0 for an encoder, which holds none."""
    prompt_tokens_per_second: float = 0.0
    """Measured speed of reading prompts, writing beside it included; 0 before the first."""
    adapters: int = 0
    """Adapters that are held."""
    adapter_loads: int = 0
    """Times one was loaded since the replica started."""


@dataclass(frozen=True)
class Tokens:
    """Token ids, and how many the model can take."""

    ids: tuple[int, ...]
    context_length: int


class Backend(Protocol):
    """Whoever answers calls: an engine replica, or a handle to one."""

    def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The pieces in batches; a refusal is the last thing given. Closing the iterator early cancels the call."""
        ...

    async def read(self, call: ReadCall) -> Readings | Refusal:
        """What the model says of texts."""
        ...

    async def tokenize(self, prompt: Prompt) -> Tokens | Refusal:
        """The token ids that a text or a conversation becomes; ids stay what they are."""
        ...

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Refusal:
        """The text of token ids, special tokens left out."""
        ...

    async def statuses(self) -> Mapping[str, ReplicaStatus | Refusal]:
        """How one replica of each version is, by digest, the one that is asked first before its canary."""
        ...

    async def asleep(self) -> bool:
        """Whether no replica runs."""
        ...

    async def reports(self) -> Mapping[str, Sequence[LoadReport]]:
        """The work of each replica, by the digest of its version; of those that say nothing in time there is none."""
        ...
