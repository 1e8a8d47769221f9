"""Tools that a model may call, and the ways in which models write calls.

A `Convention` is found out from the model's own chat template: a call is rendered through it, and what stands around
its name and arguments says how this model writes calls, to the last space. From it follow the grammar that an answer
is held to, so that arguments always fit their function's schema, and the reader that finds the calls in the answer.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from configs.schema.generation import JSON_STYLE

PROBE = "probe_function"
PROBE_TOOL = {
    "type": "function",
    "function": {"name": PROBE, "description": "d", "parameters": {"type": "object", "properties": {}}},
}
PROBE_CALL = {"type": "function", "id": "abcdefghi", "function": {"name": PROBE, "arguments": {"probe": "value"}}}
PROBE_ARGUMENTS = r'\{\s*"probe":\s*"value"\s*\}'
"""How a template may spell the arguments of `PROBE_CALL`."""


@dataclass(frozen=True)
class Function:
    """A function that is offered to a model."""

    name: str
    """Letters, digits, `_` and `-`."""
    parameters: str
    """JSON schema of the object that it takes, as JSON."""
    description: str | None = None

    @property
    def rendered(self) -> dict[str, Any]:
        """What a chat template gets."""
        described = {} if self.description is None else {"description": self.description}
        return {
            "type": "function",
            "function": {"name": self.name, **described, "parameters": json.loads(self.parameters)},
        }


@dataclass(frozen=True)
class ToolUse:
    """What an answer may, or has to, call."""

    functions: tuple[Function, ...]
    required: bool = False
    """Whether it is to be a call, and no text."""
    parallel: bool = True
    """Whether there may be several."""


@dataclass(frozen=True)
class Convention(ABC):
    """How a model writes calls: `opening`, the name, `middle`, the arguments as JSON, `closing`."""

    opening: str
    middle: str
    closing: str

    pattern: ClassVar[str]
    """Of a call of the probe in a rendered conversation; its groups are the fields."""
    mark: ClassVar[str] = ""
    """What an opening begins with, and text that is no call never holds; may be the name of a special token."""
    next_call: ClassVar[str | None] = None
    """Stands instead of `closing` and another `opening` between two calls."""

    @classmethod
    def found_in(cls, rendered: str) -> Self | None:
        """The convention with the spaces that a rendered call of the probe has; None if it is written otherwise."""
        found = re.search(cls.pattern, rendered)
        return None if found is None else cls(**found.groupdict())

    def grammar(self, use: ToolUse, mark_id: int | None) -> str:
        """The answers that `use` allows, in llguidance's Lark.

        Args:
            use: what may be called.
            mark_id: of the special token that `mark` names, if it is one.
        """
        rules = self._rules(use, mark_id)
        calls = " | ".join(f"call{index}" for index in range(len(use.functions)))
        for index, function in enumerate(use.functions):
            schema = {"type": "object", **json.loads(function.parameters), "x-guidance": JSON_STYLE}
            rules += [f"call{index}: {_quoted(self.call_lead + function.name + self.middle)} arguments{index}"]
            rules += [f"arguments{index}: %json {json.dumps(schema)}"]
        return "\n".join([*rules, f"call: {calls}"])

    def _opened(self, mark_id: int | None) -> str:
        """The opening in Lark."""
        if mark_id is None:
            return _quoted(self.opening)
        return f"<[{mark_id}]> {_quoted(self.opening.removeprefix(self.mark))}"

    def _lead(self, mark_id: int | None) -> list[str]:
        """`TEXT`, which is no call, and `lead`: such text, or none, and an opening."""
        if mark_id is not None:
            return [f"TEXT: {_ANYTHING}", f"lead: TEXT? {self._opened(mark_id)}"]
        # One lexeme: text and opening could not be told apart while the mark is incomplete.
        return [f"TEXT: {_without(self.mark)}", "lead: LEAD", f"LEAD: TEXT {_quoted(self.opening)}"]

    @property
    def call_lead(self) -> str:
        """What `call` has before the name."""
        return ""

    @abstractmethod
    def _rules(self, use: ToolUse, mark_id: int | None) -> list[str]:
        """`start` and what it needs, over `call`: a name, `middle` and arguments."""


@dataclass(frozen=True)
class TaggedCalls(Convention):
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, with text around: Hermes, Qwen 2.5 and 3."""

    mark: ClassVar[str] = "<tool_call>"
    pattern: ClassVar[str] = (
        rf'(?P<opening><tool_call>\s*\{{"name":\s*"){PROBE}(?P<middle>",\s*"arguments":\s*){PROBE_ARGUMENTS}'
        r"(?P<closing>\s*\}\s*</tool_call>)"
    )

    def _rules(self, use: ToolUse, mark_id: int | None) -> list[str]:
        opening, one = self._opened(mark_id), f"call {_quoted(self.closing)}"
        if use.required:
            more = rf'("\n" {opening} {one})*' if use.parallel else ""
            return [f"start: {opening} {one} {more}"]
        many = "*" if use.parallel else "?"
        return [f"start: (lead {one}){many} TEXT?", *self._lead(mark_id)]


@dataclass(frozen=True)
class ListedCalls(Convention):
    """`[TOOL_CALLS] [{"name": ..., "arguments": ...}, ...]` after any text: Mistral."""

    mark: ClassVar[str] = "[TOOL_CALLS]"
    next_call: ClassVar[str | None] = '}, {"name": "'
    pattern: ClassVar[str] = (
        rf'(?P<opening>\[TOOL_CALLS\]\s*\[\{{"name":\s*"){PROBE}(?P<middle>",\s*"arguments":\s*){PROBE_ARGUMENTS}'
        # In a history calls may have ids; models write none.
        r'(?:,\s*"id":\s*"\w*")?(?P<closing>\s*\}\s*\])'
    )

    def _rules(self, use: ToolUse, mark_id: int | None) -> list[str]:
        more = f"({_quoted(self.next_call or '')} call)*" if use.parallel else ""
        calls = f"call {more} {_quoted(self.closing)}"
        if use.required:
            return [f"start: {self._opened(mark_id)} {calls}"]
        return [f"start: TEXT? | lead {calls}", *self._lead(mark_id)]


@dataclass(frozen=True)
class BareCall(Convention):
    """An answer that is `{"name": ..., "parameters": ...}` and nothing else: Llama 3. There is never more than one."""

    pattern: ClassVar[str] = (
        rf'(?P<opening>\{{"name":\s*"){PROBE}(?P<middle>",\s*"parameters":\s*){PROBE_ARGUMENTS}(?P<closing>\s*\}})'
    )

    @property
    def call_lead(self) -> str:
        """The opening: one lexeme with the name, as text that begins like a call may go on up to there."""
        return self.opening

    def _rules(self, use: ToolUse, mark_id: int | None) -> list[str]:
        one = f"call {_quoted(self.closing)}"
        if use.required:
            return [f"start: {one}"]
        # JSON that is no call of an offered function is an answer like any other.
        names = "|".join(function.name for function in use.functions)
        call = rf'/\s*\{{\s*"name"\s*:\s*"({names})"(?s:.*)/'
        return [f"start: TEXT? | {one}", f"TEXT: {_ANYTHING} & ~{call}"]


CONVENTIONS: tuple[type[Convention], ...] = (TaggedCalls, ListedCalls, BareCall)
"""In the order in which they are looked for."""

_ANYTHING = "/(?s:.*)/"


def recognized(rendered: str) -> Convention | None:
    """The convention of a template that rendered `PROBE_CALL` so; None if it is none of these."""
    return next((found for kind in CONVENTIONS if (found := kind.found_in(rendered)) is not None), None)


@dataclass(frozen=True)
class CallDelta:
    """What was added to one call of an answer."""

    index: int
    name: str | None
    """Given once, at first."""
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What was added to an answer: text, and calls."""

    content: str
    calls: tuple[CallDelta, ...] = ()


class CallReader:
    """Finds the calls in one answer as it comes. Where its text is cut into pieces changes nothing.

    What turns out to be no call of an offered function is text. Spaces between text and calls belong to neither. A
    call that is cut off has the arguments that there are.
    """

    def __init__(self, convention: Convention, names: Collection[str]) -> None:
        self._convention = convention
        self._names = names
        self._state = self._text
        self._space = ""
        """Spaces that are text unless a call follows."""
        self._held = ""
        """What may be the beginning of a call, or its end."""
        self._drops_space = False
        """Whether a call has ended right here."""
        self._texted = False
        """Whether there was text."""
        self._name = ""
        self._depth, self._quoted, self._escaped = 0, False, False
        self._begun = 0
        self._content: list[str] = []
        self._calls: dict[int, tuple[str | None, list[str]]] = {}

    @property
    def calls(self) -> int:
        """Calls found so far."""
        return self._begun

    def push(self, text: str) -> Delta:
        """What is certain once the answer goes on with `text`."""
        for character in text:
            self._state(character)
        return self._taken()

    def flush(self) -> Delta:
        """What is held at the end of the answer."""
        if self._state != self._after and self._state != self._arguments:
            self._give_up()
            if not self._drops_space:
                self._content.append(self._space)
            self._space = ""
        return self._taken()

    def _taken(self) -> Delta:
        calls = tuple(CallDelta(i, name, "".join(parts)) for i, (name, parts) in self._calls.items())
        delta = Delta("".join(self._content), calls)
        self._content, self._calls = [], {}
        return delta

    def _text(self, character: str) -> None:
        opening = self._opening
        if opening.startswith(self._held + character) and opening:
            self._held += character
            if self._held == opening:
                self._state, self._name = self._named, ""
            return
        if self._held:
            self._give_up()
            self._text(character)
        elif character.isspace():
            self._space += character
        else:
            self._say(character)

    @property
    def _opening(self) -> str:
        """What begins a call here; nothing does, where a call is all of an answer and there was something else."""
        alone = not self._convention.mark
        return "" if alone and (self._texted or self._begun) else self._convention.opening

    def _named(self, character: str) -> None:
        """In the name and what follows it, up to the arguments."""
        self._held += character
        self._name += character
        offered = [name + self._convention.middle for name in self._names]
        if self._name.endswith("{") and self._name[:-1] in offered:
            self._calls[self._begun] = (self._name.removesuffix(self._convention.middle + "{"), [])
            self._begun += 1
            self._space = self._held = ""
            self._state, self._depth, self._quoted, self._escaped = self._arguments, 0, False, False
            self._arguments(character)
        elif self._name not in offered and not any(start.startswith(self._name) for start in offered):
            self._name, self._held = "", self._held[:-1]
            self._give_up()
            self._state = self._text
            self._text(character)

    def _arguments(self, character: str) -> None:
        """In a JSON object, up to the brace that ends it."""
        self._calls.setdefault(self._begun - 1, (None, []))[1].append(character)
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._quoted = True
        else:
            self._depth += (character in "{[") - (character in "}]")
            if not self._depth:
                self._state = self._after

    def _after(self, character: str) -> None:
        """In what ends a call, or begins the next one."""
        convention = self._convention
        self._held += character
        if self._held == convention.closing:
            self._held, self._state, self._drops_space = "", self._text, True
        elif self._held == convention.next_call:
            self._state, self._name = self._named, ""
        elif not any(end.startswith(self._held) for end in (convention.closing, convention.next_call or "")):
            held, self._held, self._state, self._drops_space = self._held, "", self._text, True
            for each in held:
                self._text(each)

    def _give_up(self) -> None:
        """What is held is text."""
        held, self._held = self._held, ""
        if held:
            self._say(held)

    def _say(self, text: str) -> None:
        if not self._drops_space:
            self._content.append(self._space)
        self._content.append(text)
        self._space, self._drops_space, self._texted = "", False, True


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _without(mark: str) -> str:
    """Any text that does not hold `mark`."""
    escaped = re.sub(r"([\[\]/])", r"\\\1", mark)
    return f"{_ANYTHING} & ~/(?s:.*){escaped}(?s:.*)/"


def read_calls(convention: Convention, names: Sequence[str], text: str) -> tuple[str, list[tuple[str, str]]]:
    """A whole answer's text, and name and arguments of each call in it."""
    reader = CallReader(convention, names)
    parts = [reader.push(text), reader.flush()]
    calls: list[tuple[str, str]] = []
    for each in (call for part in parts for call in part.calls):
        if each.name is not None:
            calls.append((each.name, ""))
        name, arguments = calls[each.index]
        calls[each.index] = (name, arguments + each.arguments)
    return "".join(part.content for part in parts), calls
