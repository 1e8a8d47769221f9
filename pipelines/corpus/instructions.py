"""Prompt/completion pairs derived from Python source with `ast`.

Two tasks, both checkable against what the author wrote: `summary` shows a function without its docstring and wants the
docstring's first line; `signature` gives that line and the function's name and wants the `def` line. The name ends the
prompt of `signature`, a few tokens before the place where the answer repeats it, because copying over a short fixed
distance is what a small model learns first.
"""

from __future__ import annotations

import ast
import hashlib
import io
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

from configs.schema.corpus import InstructionsConfig

Task = Literal["summary", "signature"]
Function = ast.FunctionDef | ast.AsyncFunctionDef

MIN_SUMMARY_WORDS = 3
"""Shorter first lines ("Docstring.", "Test foo.") say nothing that could be learned from the body."""


class Pair(BaseModel):
    """One line of an instruction dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    task: Task
    prompt: str
    completion: str
    source: str
    """`file:qualified.name` of the function."""


def summary_prompt(source: str) -> str:
    """What the user asks to have a function described."""
    return f"Summarize this function.\n\n{source}"


def signature_prompt(summary: str, name: str) -> str:
    """What the user asks to have a signature written."""
    return f"{summary}\nWrite the signature of {name}"


def parse_pairs(name: str, text: str, config: InstructionsConfig) -> list[Pair] | str:
    """The pairs of one file, in the order of the source; or the reason why the file does not parse."""
    text = text.removeprefix("\ufeff")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    lines = list(io.StringIO(text, newline=""))  # ends lines where the parser does; splitlines() also splits at \f
    return [
        pair
        for qualified, function in _functions(tree, "")
        for pair in _pairs(f"{name}:{qualified}", function, lines, config)
    ]


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Functions at any depth with their qualified names. Expressions hold none, so they are not visited."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                qualified = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield qualified, child
                yield from _functions(child, f"{qualified}.")
            else:
                yield from _functions(child, prefix)


def _pairs(source: str, function: Function, lines: list[str], config: InstructionsConfig) -> Iterator[Pair]:
    summary = _first_line(function)
    if summary is None:
        return
    asked: dict[Task, tuple[str, str] | None] = {
        "summary": _summary(function, summary, lines),
        "signature": (signature_prompt(summary, function.name), _signature(function)),
    }
    for task in config.tasks:
        pair = asked[task]
        if pair is None or len(pair[0]) > config.max_prompt_chars or len(pair[1]) > config.max_completion_chars:
            continue
        key = "\0".join([task, *pair]).encode()
        yield Pair(
            id=f"{task}-{hashlib.sha256(key).hexdigest()[:16]}",
            task=task,
            prompt=pair[0],
            completion=pair[1],
            source=source,
        )


def _first_line(function: Function) -> str | None:
    """The first line of the docstring if it reads like a sentence: some words, the first of which is one."""
    docstring = ast.get_docstring(function)
    line = docstring.strip().split("\n", 1)[0].strip() if docstring else ""
    words = line.split()
    return line if len(words) >= MIN_SUMMARY_WORDS and words[0].isalpha() else None


def _summary(function: Function, summary: str, lines: list[str]) -> tuple[str, str] | None:
    """The function's text without decorators and docstring, and the summary; None if no statement is left."""
    docstring, *rest = function.body
    if not rest or docstring.lineno <= function.lineno or docstring.end_lineno == rest[0].lineno:
        return None
    kept = lines[function.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : function.end_lineno]
    return summary_prompt(textwrap.dedent("".join(kept)).strip()), summary


def _signature(function: Function) -> str:
    """The `def` line, on one line, without annotations."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {function.name}({ast.unparse(arguments)}):"


def deduplicate(pairs: Iterable[Pair], seen: set[tuple[Task, str]]) -> list[Pair]:
    """The first pair, by id, of each prompt that is not in `seen`, sorted by id; `seen` learns the prompts."""
    kept = []
    for pair in sorted(pairs, key=lambda p: (p.id, p.source)):
        if (pair.task, pair.prompt) not in seen:
            seen.add((pair.task, pair.prompt))
            kept.append(pair)
    return kept
