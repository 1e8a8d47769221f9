"""The parts of a chat request that say what was said, and what may be called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from actors.tools import Function
from serving.calls import Conversation, Message, PastCall
from serving.openai.body import parse
from serving.openai.formats import Strict, wrong, wrong_field

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _content(value: Any) -> Any:
    """A message's text; text parts are joined."""
    if isinstance(value, list):
        if not all(isinstance(p, dict) and p.keys() == {"type", "text"} and p["type"] == "text" for p in value):
            wrong('allowed: a string, or a list of parts {"type": "text", "text": ...}')
        if all(isinstance(p["text"], str) for p in value):
            return "".join(p["text"] for p in value)
    return value


def _arguments(value: Any) -> Any:
    """JSON in a string, as models write it; templates render objects."""
    try:
        arguments = parse(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        wrong("allowed: a JSON object, written as a string")
    return value


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A function, and what it was called with."""

    name: FunctionName
    arguments: Annotated[str, BeforeValidator(_arguments)]


class ToolCall(Strict):
    """A call that the assistant made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Strict):
    """One message of a conversation. `null` stands for a field that is not there, as clients send answers back."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_content, json_schema_input_type=str | list[TextPart])]
    tool_calls: Annotated[tuple[ToolCall, ...], Field(min_length=1, strict=False)] | None = None
    tool_call_id: str | None = None
    """Of the call whose result this is."""

    @model_validator(mode="before")
    @classmethod
    def _spare_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        said = {name: value for name, value in data.items() if value is not None or name in ("role", "content")}
        if said.get("tool_calls") and said.get("content") is None:
            said["content"] = ""
        return said

    @model_validator(mode="after")
    def _fields_of_the_role(self) -> Self:
        if self.tool_calls is not None and self.role != "assistant":
            wrong_field("tool_calls", "allowed only in messages of the assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            wrong_field("tool_call_id", "goes with role tool, and with no other")
        return self


Messages = Annotated[tuple[ChatMessage, ...], Field(min_length=1, strict=False)]


class FunctionOffer(Strict):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] = Field({"type": "object", "properties": {}, "additionalProperties": False})
    """JSON schema of its arguments. They are held to it whether `strict` is set or not."""
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None or k == "name"} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.parameters.get("type", "object") != "object":
            wrong_field("parameters", 'allowed: a JSON schema with "type": "object"')
        return self


class Tool(Strict):
    """Something the model may use; functions are all there is."""

    type: Literal["function"]
    function: FunctionOffer


Tools = Annotated[tuple[Tool, ...], Field(min_length=1, max_length=128, strict=False)]


def _choice(value: Any) -> Any:
    match value:
        case {"type": "function", "function": {"name": str(name), **other}, **others} if not other and not others:
            return NamedFunction(name=name)
    if value not in ("none", "auto", "required"):
        wrong('allowed: "none", "auto", "required", or {"type": "function", "function": {"name": ...}}')
    return value


class NamedFunction(Strict):
    """A `tool_choice` that leaves none."""

    name: str


class ChosenFunction(Strict):
    """The same as clients write it."""

    type: Literal["function"]
    function: NamedFunction


_ChoiceForms = Literal["none", "auto", "required"] | ChosenFunction
ToolChoice = Annotated[str | NamedFunction, BeforeValidator(_choice, json_schema_input_type=_ChoiceForms)]


def functions(tools: tuple[Tool, ...]) -> tuple[Function, ...]:
    """What is offered. Raises inside a validator if two have one name."""
    names = [tool.function.name for tool in tools]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        wrong_field("tools", f"{double} is there twice; allowed: names that differ")
    return tuple(
        Function(f.name, json.dumps(f.parameters, ensure_ascii=False), f.description)
        for f in (tool.function for tool in tools)
    )


def conversation(messages: tuple[ChatMessage, ...], tools: tuple[Function, ...] = ()) -> Conversation:
    """What is to be continued. Raises inside a validator if a result belongs to no call."""
    return Conversation(tuple(_said(messages)), tools)


def _said(messages: tuple[ChatMessage, ...]) -> Iterator[Message]:
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        calls = tuple(PastCall(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ())
        names.update((call.id, call.name) for call in calls)
        if message.tool_call_id is not None and message.tool_call_id not in names:
            wrong_field(f"messages.{index}.tool_call_id", "no call before it has this id")
        yield Message(message.role, message.content, calls, message.tool_call_id, names.get(message.tool_call_id or ""))
