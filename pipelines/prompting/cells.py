"""Asks one model one way: a template, a number of examples and a way to draw, over all items of a task.

What prompts have in common at their beginning is computed once, which is the engine's doing: `cached_tokens` counts it.
Answers are kept on disk group by group, so that a killed sweep goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from actors.engine.engine import Engine
from actors.engine.request import Completion, Request
from actors.store.artifacts import write_durably
from configs.prompts import word_for
from configs.schema.generation import Sampling, Structure
from configs.schema.prompting import Drawing, PromptTemplate
from configs.schema.tasks import Task
from pipelines.evaluation.items import Item
from pipelines.evaluation.responses import Response
from pipelines.evaluation.scoring import Vectors, prediction, vectors
from pipelines.prompting.examples import Chooser, FittedPrompt, TooLongError, fit_prompt

GROUP = 256
"""Items that are asked together, and lost together if the sweep is killed."""


@dataclass(frozen=True)
class Way:
    """One way to ask."""

    template: PromptTemplate
    shots: int
    drawing: Drawing
    chat: bool
    held_to_choices: bool


class Answer(BaseModel):
    """One item as it was asked and answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str
    prompt: str
    """All of it as text, special tokens left out."""
    examples: tuple[str, ...]
    """Ids of those that fitted, in the order they were shown."""
    text: str
    prediction: str
    references: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    """Those of the prompt whose keys and values were there already; it depends on what was asked before, and is no part
    of a report."""
    tokens: int
    error: str | None
    vectors: Vectors
    """What the item adds to the sum of each of the task's metrics."""


class _Group(BaseModel):
    answers: tuple[Answer, ...]


def ask_way(
    engine: Engine,
    task: Task,
    items: Sequence[Item],
    way: Way,
    chooser: Chooser | None,
    kept: Path,
    progress: Callable[[Sequence[Answer]], None],
) -> list[Answer]:
    """An answer for each item, in their order; what `kept` holds already is not asked again. An item that does not fit
    the model's window with room for its answer is not asked, and counts as one without an answer.

    Args:
        engine: with nothing in flight.
        chooser: of the examples; None shows none.
        progress: told the answers so far, after every group.

    Raises:
        RequestError: the model has no chat template.
        DataError: a record lacks a field of the template.
    """
    kept.mkdir(parents=True, exist_ok=True)
    answers: list[Answer] = []
    for start in range(0, len(items), GROUP):
        path = kept / f"{start:08d}.json"
        if path.exists():
            answers += _Group.model_validate_json(path.read_bytes()).answers
        else:
            made = _ask_group(engine, task, items[start : start + GROUP], way, chooser)
            write_durably(path, _Group(answers=tuple(made)).model_dump_json().encode())
            answers += made
        progress(answers)
    return answers


def _ask_group(engine: Engine, task: Task, items: Sequence[Item], way: Way, chooser: Chooser | None) -> list[Answer]:
    fitted = [_fit(engine, task, item, way, chooser) for item in items]
    requests = [
        Request(str(number), prompt.token_ids, sampling_of(task, items[number], way))
        for number, prompt in enumerate(fitted)
        if isinstance(prompt, FittedPrompt)
    ]
    completions = iter(engine.generate(requests))
    return [
        _answer(task, item, way, engine.text.decode(prompt.token_ids), prompt, next(completions))
        if isinstance(prompt, FittedPrompt)
        else _unasked(task, item, prompt)
        for item, prompt in zip(items, fitted, strict=True)
    ]


def _fit(engine: Engine, task: Task, item: Item, way: Way, chooser: Chooser | None) -> FittedPrompt | TooLongError:
    room = engine.context_length - sampling_of(task, item, way).max_new_tokens
    examples = () if chooser is None else chooser.choose(item, way.shots)
    try:
        return fit_prompt(engine.text, way.template, item, examples, chat=way.chat, room=room)
    except TooLongError as error:
        return error


def sampling_of(task: Task, item: Item, way: Way) -> Sampling:
    """How an item is answered: the task's length and stops, the drawing, and the choices if answers are held to them.

    Held answers have room for the longest choice, whose tokens are a byte or more. A completion also ends where the
    next example would begin.
    """
    answering, template = task.answering, way.template
    # Items have seeds of their own: with one seed, prompts of the same length would be answered with the same luck.
    seed = int.from_bytes(hashlib.sha256(f"{way.drawing.seed} {item.id}".encode()).digest()[:8]) >> 1
    drawing: dict[str, Any] = {**way.drawing.model_dump(), "seed": seed}
    if way.held_to_choices and item.choices:
        before = "" if way.chat else template.delimiter
        choices = tuple(before + word_for(template, choice) for choice in item.choices)
        longest = max(len(choice.encode()) for choice in choices) + 1
        return Sampling(max_new_tokens=longest, structure=Structure(choice=choices), **drawing)
    stops = answering.stop if way.chat else (*answering.stop, template.separator)
    return Sampling(max_new_tokens=answering.max_new_tokens, stop=tuple(dict.fromkeys(stops)), **drawing)


def _answer(task: Task, item: Item, way: Way, prompt: str, fitted: FittedPrompt, completion: Completion) -> Answer:
    words = tuple(word_for(way.template, choice) for choice in item.choices)
    error = None if completion.error is None else str(completion.error)
    response = Response(texts=() if error else (completion.text,), error=error)
    renamed = replace(item, choices=words)
    said = prediction(task, renamed, response)
    back: Mapping[str, str] = dict(zip(words, item.choices, strict=True))
    return Answer(
        item=item.id,
        prompt=prompt,
        examples=tuple(example.id for example in fitted.examples),
        text=completion.text,
        prediction=back.get(said, said),
        references=item.references,
        finish_reason=completion.finish_reason,
        prompt_tokens=completion.prompt_tokens,
        cached_tokens=completion.cached_tokens,
        tokens=len(completion.token_ids),
        error=error,
        vectors=vectors(task, renamed, response),
    )


def _unasked(task: Task, item: Item, error: TooLongError) -> Answer:
    return Answer(
        item=item.id,
        prompt=item.prompt,
        examples=(),
        text="",
        prediction="",
        references=item.references,
        finish_reason="error",
        prompt_tokens=0,
        cached_tokens=0,
        tokens=0,
        error=str(error),
        vectors=vectors(task, item, Response(error=str(error))),
    )
