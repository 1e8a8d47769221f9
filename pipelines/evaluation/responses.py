"""What a model is asked and what it says, whether it runs in this process or behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from configs.prompts import Message
from configs.schema.tasks import Answering

Prompt = str | list[Message]
"""A text to continue, or a conversation whose next message is the answer."""


class Response(BaseModel):
    """What a model said to one item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[str, ...] = ()
    """Generated answers."""
    logprobs: tuple[float, ...] = ()
    """Natural logarithm of the probability of each choice after the prompt, or of the one text."""
    tags: tuple[str, ...] = ()
    """Of words."""
    prompt_tokens: int = 0
    tokens: int = 0
    """Tokens generated, or whose probability was asked."""
    finish_reason: str = "stop"
    truncated: bool = False
    """Whether the prompt was longer than the window; its beginning was then left out."""
    error: str | None = None
    """Why there is no answer. Such an item counts as wrong."""


class Responder(Protocol):
    """A model that answers. Responses are in the order of what was asked."""

    def facts(self) -> dict[str, Any]:
        """What the report says of it: what runs it, its digest, its precision, its text contract."""
        ...

    @property
    def talks(self) -> bool:
        """Whether it is asked in conversations."""
        ...

    def fits(self, prompt: Prompt, answers: Sequence[str] | int) -> bool:
        """Whether a prompt leaves room in the window for each of some answers, or for one of so many tokens; True where
        only the model's own side can tell."""
        ...

    def likelihoods(self, asked: Sequence[tuple[Prompt, Sequence[str]]]) -> list[Response]:
        """How likely each of some continuations is after a prompt."""
        ...

    def documents(self, texts: Sequence[str], stride: int | None) -> list[Response]:
        """How likely whole texts are, read in a window that moves by `stride` tokens."""
        ...

    def generate(self, prompts: Sequence[Prompt], answering: Answering) -> list[Response]:
        """Answers in words."""
        ...

    def classify(self, texts: Sequence[str], choices: Sequence[str]) -> list[Response]:
        """Probabilities of classes, from the model's own head."""
        ...

    def tag(self, sentences: Sequence[Sequence[str]]) -> list[Response]:
        """A tag for each word."""
        ...

    @property
    def reads_only(self) -> bool:
        """Whether it is an encoder, which has a head instead of words of its own."""
        ...
