"""How text is generated from a model."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from configs.schema.base import Config

MAX_LOGPROBS = 20
"""Most alternatives that can be asked for beside a token's own log-probability."""
MAX_STOPS = 16
JSON_STYLE = {"whitespace_flexible": False, "whitespace_pattern": r"[ \n]?", "lenient": False}
"""How JSON under a schema is written: at most one space or line break between values, as models that may write any
number of them do not stop. Keywords that are not known are refused, whatever the schema says."""

Penalty = Annotated[float, Field(ge=-2, le=2)]


class Structure(Config):
    """What the generated text has to be, from its first character to its last; exactly one of these is set."""

    json_schema: str | None = None
    """Valid JSON under this schema, itself given as JSON."""
    regex: str | None = None
    """A full match, in the syntax of Rust's `regex`."""
    grammar: str | None = None
    """A sentence of this grammar, in the Lark dialect of llguidance."""
    choice: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """One of these texts."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.model_fields_set - {name for name, value in self if value is None}) != 1:
            raise PydanticCustomError("structure", "exactly one of json_schema, regex, grammar and choice is allowed")
        return self


class Sampling(Config):
    """Sampling parameters of one request. `temperature` 0 is greedy decoding.

    Logits are changed in this order: `logit_bias`, `repetition_penalty`, `presence_penalty` and `frequency_penalty`,
    `min_tokens` and `structure`, `temperature`, `top_k`, `top_p`, `min_p`.
    """

    max_new_tokens: Annotated[int, Field(ge=0)] = 64
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Before this many tokens neither stop tokens are drawn nor stop strings looked for."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k most likely tokens are drawn from; 0 is all of them."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the smallest set of tokens with this probability mass is drawn from."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens with at least this share of the likeliest token's probability are drawn from."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Divides positive and multiplies negative logits of all tokens in the prompt and the text so far."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens generated so far."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit once for each time it was generated."""
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = Field({})
    """Added to the logits of these tokens."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=MAX_STOPS)] = ()
    """Generation ends before the first of these strings; none of it is given out."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Generation ends at one of these tokens; the model's end-of-text tokens are always among them."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """The tokens drawn are a function of (seed, position) and the logits alone."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Each token's log-probability under the model's own distribution, with those of this many likeliest tokens."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """The same for the tokens of the prompt, but the first, which nothing precedes."""
    structure: Structure | None = None
    """What the text has to be; None is any text."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.min_tokens > self.max_new_tokens:
            raise PydanticCustomError("min_tokens", "min_tokens is more than max_new_tokens")
        if self.min_tokens and self.structure is not None:
            raise PydanticCustomError("min_tokens", "min_tokens and structure exclude each other")
        return self
