"""Routes that read texts and write none: `/v1/embeddings`, `/v1/classify`, `/v1/ner`, `/v1/score`.

Embeddings have OpenAI's shape; classes and scores have vLLM's, and entities a shape of their own. A field that is not
honoured is refused by name, `dimensions` among them: a model's vectors are given as they are.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from actors.engine.encodings import Classification, Embedding, Tagging
from serving.calls import ReadCall, Readings, Refusal, fingerprint
from serving.openai.formats import Strict, wrong, wrong_field


def _texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        wrong("allowed: a string or a list of strings, none of them empty (token ids are not read)")
    return tuple(texts)


_Text = Annotated[str, Field(min_length=1)]
_TextForms = _Text | Annotated[list[_Text], Field(min_length=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts, json_schema_input_type=_TextForms)]


class _ReadRequest(Strict):
    """What all of them share."""

    model: str
    truncate: bool = False
    """Whether the end of a text that is longer than the model's window is left out; it is refused otherwise."""
    user: str | None = None
    """Who asks: all of theirs go to one version where there is a canary; has no other effect."""
    return_timing: bool = False
    """The answer says where its time went, in the header `Server-Timing`."""

    text_field: ClassVar[str] = "input"

    def named(self, refusal: Refusal) -> Refusal:
        """A refusal that names the field as the client knows it."""
        return replace(refusal, param=self.text_field) if refusal.param == "text" else refusal


class EmbeddingsRequest(_ReadRequest):
    """Body of `POST /v1/embeddings`."""

    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    normalize: bool = True
    """Whether vectors get length 1."""

    def call(self, call_id: str) -> ReadCall:
        """What an engine replica is asked."""
        return ReadCall(call_id, "embeddings", self.input, truncate=self.truncate, normalize=self.normalize)

    def entries(self, readings: Readings) -> list[dict[str, Any]]:
        """A vector a text: numbers, or their fp32 little-endian bytes in base64."""
        vectors = [each.vector for each in readings.encodings if isinstance(each, Embedding)]
        return [
            {"object": "embedding", "index": index, "embedding": self._spelt(vector)}
            for index, vector in enumerate(vectors)
        ]

    def _spelt(self, vector: Sequence[float]) -> Sequence[float] | str:
        if self.encoding_format == "float":
            return vector
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


class ClassifyRequest(_ReadRequest):
    """Body of `POST /v1/classify`."""

    input: Texts
    pair: Texts | None = None
    """For each text a second one that is judged together with it."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.pair is not None and len(self.pair) != len(self.input):
            wrong_field("pair", f"allowed: as many texts as input has, {len(self.input)}")
        return self

    def call(self, call_id: str) -> ReadCall:
        """What an engine replica is asked."""
        return ReadCall(call_id, "classify", self.input, self.pair, truncate=self.truncate)

    def entries(self, readings: Readings) -> list[dict[str, Any]]:
        """The likeliest class of each text, and the probabilities of all, in the order of the model's labels."""
        found = [each for each in readings.encodings if isinstance(each, Classification)]
        return [
            {
                "index": index,
                "label": each.label,
                "probs": list(each.scores.values()),
                "labels": list(each.scores),
                "num_classes": len(each.scores),
            }
            for index, each in enumerate(found)
        ]


class NerRequest(_ReadRequest):
    """Body of `POST /v1/ner`."""

    input: Texts

    def call(self, call_id: str) -> ReadCall:
        """What an engine replica is asked."""
        return ReadCall(call_id, "ner", self.input, truncate=self.truncate)

    def entries(self, readings: Readings) -> list[dict[str, Any]]:
        """The entities of each text; `start` and `end` count characters (Unicode code points)."""
        return [
            {
                "index": index,
                "entities": [
                    {
                        "label": span.label,
                        "text": text[span.start : span.end],
                        "start": span.start,
                        "end": span.end,
                        "score": span.probability,
                    }
                    for span in tagging.spans
                ],
            }
            for index, (text, tagging) in enumerate(zip(self.input, readings.encodings, strict=True))
            if isinstance(tagging, Tagging)
        ]


class ScoreRequest(_ReadRequest):
    """Body of `POST /v1/score`: one text against each of several, or pairs of texts."""

    text_field: ClassVar[str] = "text_1"

    text_1: Texts
    text_2: Texts

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if len(self.text_1) not in (1, len(self.text_2)):
            wrong_field("text_2", f"allowed: as many texts as text_1 has, {len(self.text_1)}; or one text in text_1")
        return self

    def call(self, call_id: str) -> ReadCall:
        """What an engine replica is asked."""
        firsts = self.text_1 if len(self.text_1) == len(self.text_2) else self.text_1 * len(self.text_2)
        return ReadCall(call_id, "score", firsts, self.text_2, truncate=self.truncate)

    def entries(self, readings: Readings) -> list[dict[str, Any]]:
        """A number a pair."""
        return [{"index": index, "object": "score", "score": score} for index, score in enumerate(readings.scores)]


ReadRequest = EmbeddingsRequest | ClassifyRequest | NerRequest | ScoreRequest


def read_answer(asked: ReadRequest, call_id: str, created: int, readings: Readings) -> dict[str, Any]:
    """The body of the answer."""
    return {
        "id": call_id,
        "object": "list",
        "created": created,
        "model": asked.model,
        "system_fingerprint": fingerprint(readings.model_digest),
        "data": asked.entries(readings),
        "usage": {"prompt_tokens": readings.prompt_tokens, "total_tokens": readings.prompt_tokens},
    }
