"""Prompts from templates: text for models that continue a text, messages for models that talk.

Guarantees: a field's value is put in as it is, braces and all; what an example looks like is what the item looks like,
with its answer behind it. Which tokens that becomes is the tokenizer's and the chat template's matter (`actors.text`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.errors import DataError
from configs.schema.prompting import PromptTemplate
from configs.schema.tasks import fill

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """Something that was answered rightly."""

    id: str
    fields: Mapping[str, Any] = field(compare=False)
    """The record."""
    answer: str
    """As the task calls it."""


def word_for(template: PromptTemplate, answer: str) -> str:
    """What a template calls an answer."""
    return template.words.get(answer, answer)


def render_answer(template: PromptTemplate, answer: str) -> str:
    """What follows a prompt that is a text: the delimiter and the answer."""
    return template.delimiter + word_for(template, answer)


def render_completion(template: PromptTemplate, fields: Mapping[str, Any], examples: Sequence[Example] = ()) -> str:
    """A text whose continuation, after the delimiter, is the answer.

    The delimiter is left out at its end: tokenizers join a space to the word behind it.

    Raises:
        DataError: a record lacks a field.
    """
    shown = [_filled(template, example.fields) + render_answer(template, example.answer) for example in examples]
    parts = [fill(part, {}) for part in (template.system, template.instruction) if part]
    return template.separator.join([*parts, *shown, _filled(template, fields)])


def render_messages(
    template: PromptTemplate, fields: Mapping[str, Any], examples: Sequence[Example] = ()
) -> list[Message]:
    """A conversation whose next message is the answer.

    Raises:
        DataError: a record lacks a field.
    """
    turns: list[Message] = []
    for example in examples:
        turns.append({"role": "user", "content": _filled(template, example.fields)})
        turns.append({"role": "assistant", "content": word_for(template, example.answer)})
    turns.append({"role": "user", "content": _filled(template, fields)})
    if template.instruction:
        turns[0]["content"] = fill(template.instruction, {}) + template.separator + turns[0]["content"]
    return [{"role": "system", "content": fill(template.system, {})}, *turns] if template.system else turns


def _filled(template: PromptTemplate, fields: Mapping[str, Any]) -> str:
    try:
        return fill(template.prompt, fields)
    except KeyError as error:
        raise DataError(
            f"prompt {template.name}: a record lacks the field {error.args[0]}",
            received=", ".join(sorted(fields)),
            allowed=f"records with {', '.join(template.fields)}",
            next_step="correct the names in the template, or use it with another task",
        ) from None
