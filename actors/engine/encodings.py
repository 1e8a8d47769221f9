"""What an encoder is asked and what it answers: a class, labelled pieces of the text, or a vector. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from configs.errors import GanymedeError

Task = Literal["classify", "tag", "embed"]
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class EncodeRequest:
    """One text to read. `id` is the caller's, unique among the requests in flight."""

    id: str
    text: str
    task: Task
    pair: str | None = None
    """A second text, to be judged together with the first; not for `tag`."""
    truncate: bool = False
    """Whether a text longer than the model's window is cut at its end; it is refused otherwise."""
    pooling: Pooling | None = None
    """For `embed`: `mean` of all tokens or the first one's (`cls`); None is what the model was made for."""
    normalize: bool = True
    """For `embed`: whether the vector gets length 1."""


@dataclass(frozen=True)
class Classification:
    """Which label a text has."""

    label: str
    """The one with the highest score."""
    scores: dict[str, float]
    """Of every label: probabilities that add up to 1; each a probability of its own where several labels may hold or
    there is just one; the bare value for a regression."""


@dataclass(frozen=True)
class Piece:
    """Characters `start` to `end` of the text have a label, with this probability."""

    start: int
    end: int
    label: str
    probability: float


@dataclass(frozen=True)
class Tagging:
    """A label for every word, and what the words' labels say together."""

    words: tuple[Piece, ...]
    """Every word with the label of its first token, by which models are trained."""
    spans: tuple[Piece, ...]
    """Words joined by the labels' prefixes, which are left off; a span's probability is the mean of its words'."""


@dataclass(frozen=True)
class Embedding:
    """A text as a vector."""

    vector: tuple[float, ...]


Encoding = Classification | Tagging | Embedding


@dataclass(frozen=True)
class EncodeEvent:
    """The one event of a request: its result, or the error it ended with."""

    request_id: str
    encoding: Encoding | None
    prompt_tokens: int
    """Tokens read, those that the tokenizer puts around a text included."""
    truncated: bool
    """Whether the text was cut to fit the window."""
    finish_reason: Literal["stop", "error"] = "stop"
    error: GanymedeError | None = None
    """Set if and only if `encoding` is not there."""
    began: float | None = field(default=None, compare=False)
    """When its batch was begun, seconds of `time.monotonic`; None if it was in none."""


def spans(words: Sequence[Piece]) -> tuple[Piece, ...]:
    """Joins words by the prefixes of their labels.

    BIO, and with E, L, S and U also BIOES and BILOU: B, S and U begin a span, I, E and L go on with one of the same
    type and begin one where there is none (as in CoNLL's evaluation). A label without a prefix is a span of its own
    for each word; `O` is none.
    """
    groups: list[tuple[str, list[Piece]]] = []
    open_type: str | None = None
    for word in words:
        prefix, type_ = _split(word.label)
        if prefix == "O":
            open_type = None
            continue
        if prefix in ("I", "E", "L") and type_ == open_type:
            groups[-1][1].append(word)
        else:
            groups.append((type_, [word]))
        open_type = type_ if prefix in ("B", "I") else None
    return tuple(
        Piece(group[0].start, group[-1].end, type_, sum(word.probability for word in group) / len(group))
        for type_, group in groups
    )


def _split(label: str) -> tuple[str, str]:
    """Prefix and type of a label; the prefix is empty where there is none."""
    if label == "O":
        return "O", ""
    if len(label) > 2 and label[1] in "-_" and label[0] in "BIELSU":
        return label[0], label[2:]
    return "", label
