"""What the models of all bodies share, and the fields that say what form an answer is to have: `response_format` and
`structured_outputs`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from configs.schema.generation import Structure


class Strict(BaseModel):
    """A body or a part of one: unknown fields and types that merely look right are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def wrong(message: str) -> NoReturn:
    """For a field whose value cannot be used; raised inside a validator."""
    raise PydanticCustomError("wrong", "{message}", {"message": message})


def wrong_field(field: str, message: str) -> NoReturn:
    """For what only several fields together make wrong: names the one that is to be changed."""
    raise PydanticCustomError("wrong", "{message}", {"message": message, "field": field})


class NamedSchema(Strict):
    """A JSON schema as `response_format` has it. The answer is held to it whether `strict` is set or not."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's own field: any text, any JSON object, or JSON under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _schema_if_named(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema goes with type json_schema, and with no other")
        return self

    def structure(self) -> Structure | None:
        """What the text has to be; None for any text."""
        if self.json_schema is not None:
            return Structure(json_schema=json.dumps(self.json_schema.schema_))
        return Structure(json_schema='{"type": "object"}') if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """The extension of other servers; exactly one of these."""

    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="json")] = None
    regex: str | None = None
    grammar: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for _, value in self) != 1:
            raise PydanticCustomError("structured_outputs", "allowed: exactly one of json, regex, grammar and choice")
        return self

    def structure(self) -> Structure:
        """What the text has to be."""
        return Structure(
            json_schema=None if self.schema_ is None else json.dumps(self.schema_),
            regex=self.regex,
            grammar=self.grammar,
            choice=None if self.choice is None else tuple(self.choice),
        )
