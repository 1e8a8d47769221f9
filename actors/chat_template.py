"""A model's chat template: from messages and tools to the text that the model reads. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2

from actors.tools import PROBE, PROBE_CALL, PROBE_TOOL, Convention, recognized
from configs.errors import RequestError

Message = Mapping[str, Any]
"""`role`, `content` and, where there are some, `tool_calls` and what else the template reads."""


class ChatTemplate:
    """A template and the special tokens that it names."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source = source
        self._special = dict(special)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The conversation as text. Raises `RequestError` if the template refuses the messages."""
        # Here and not above: it takes a second to import, and most users of `Text` only encode.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}",
                param="messages",
                received=[message.get("role") for message in messages],
            ) from error
        return rendered[0]

    @cached_property
    def convention(self) -> Convention | None:
        """How the model writes calls of tools; None if the template takes none, or its way is not known here.

        Found by rendering: a function that is offered has to show, and its call has to look as one of the conventions.
        """
        question = {"role": "user", "content": "question"}
        try:
            offer = self.render([question], add_generation_prompt=True, tools=[PROBE_TOOL])
            called = self.render(
                [question, {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}],
                add_generation_prompt=False,
            )
        except RequestError:
            return None
        return recognized(called) if PROBE in offer else None


def strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        yield from strings(list(value.values()))
    elif isinstance(value, Sequence):
        for each in value:
            yield from strings(each)


def respelt(value: Any, spell: Callable[[str], str]) -> Any:
    """The same with every text in it changed."""
    if isinstance(value, str):
        return spell(value)
    if isinstance(value, Mapping):
        return {spell(key): respelt(each, spell) for key, each in value.items()}
    return [respelt(each, spell) for each in value] if isinstance(value, Sequence) else value
