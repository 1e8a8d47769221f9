"""What the routes answer, as models for the API's document; `stream` and `reading` write answers without them.

Objects that may hold more than OpenAI's API names say so by allowing it; all others have these fields and no more.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorText(_Exact):
    """Why a request was not answered."""

    message: str
    type: str
    param: str | None
    code: str


class Error(_Exact):
    """An error in OpenAI's shape."""

    error: ErrorText


class Usage(_Exact):
    """Tokens of all prompts, each counted once, and of all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Exact):
    """Parallel lists, an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Choice(_Exact):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    sampling: dict[str, Any] = {}
    """With `return_sampling`."""


class CompletionChoice(_Choice):
    """One answer to one prompt."""

    text: str
    logprobs: CompletionLogprobs | None


class _Answer(_Exact):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class Completion(_Answer):
    """Of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class LikelyToken(_Exact):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class WrittenToken(LikelyToken):
    """A token of an answer, and what might have stood there."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Exact):
    """An entry a token."""

    content: list[WrittenToken]
    refusal: None


class AnsweredFunction(_Exact):
    """A function and its arguments, JSON in a string."""

    name: str
    arguments: str


class AnsweredCall(_Exact):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnsweredMessage(_Exact):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] = []


class ChatChoice(_Choice):
    """One answer to the conversation."""

    message: AnsweredMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(_Answer):
    """Of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ReadUsage(_Exact):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class _Reading(_Exact):
    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str
    usage: ReadUsage


class EmbeddingEntry(_Exact):
    """A vector: numbers, or their fp32 bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(_Reading):
    """Of `/v1/embeddings`."""

    data: list[EmbeddingEntry]


class ClassEntry(_Exact):
    """The likeliest class of a text, and how likely all of them are."""

    index: int
    label: str
    probs: list[float]
    labels: list[str]
    num_classes: int


class Classes(_Reading):
    """Of `/v1/classify`."""

    data: list[ClassEntry]


class Entity(_Exact):
    """A span of a text, in characters."""

    label: str
    text: str
    start: int
    end: int
    score: float


class EntitiesEntry(_Exact):
    """The entities of one text."""

    index: int
    entities: list[Entity]


class Entities(_Reading):
    """Of `/v1/ner`."""

    data: list[EntitiesEntry]


class ScoreEntry(_Exact):
    """How well a pair of texts goes together."""

    index: int
    object: Literal["score"]
    score: float


class Scores(_Reading):
    """Of `/v1/score`."""

    data: list[ScoreEntry]


class TokenIds(_Exact):
    """Of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class PromptText(_Exact):
    """Of `/detokenize`."""

    prompt: str


class ModelEntry(BaseModel):
    """A model; `/v1/models/NAME` tells more: artifact, digest, lineage, capabilities."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = Field(description="name of the model that it is an adapter over")


class ModelList(_Exact):
    """Of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelEntry]


class Status(BaseModel):
    """Of `/live` and `/health`."""

    model_config = ConfigDict(extra="allow")

    status: Literal["ok", "asleep", "starting", "stopped"] = Field(description="503 unless it is ok or asleep")
