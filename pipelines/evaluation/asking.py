"""Asks a model every item of a task once, and keeps each answer on disk as soon as its group is through.

The groups follow from the items alone, and a run that was killed goes on with those that have no answers yet. What is
kept is a row for each item: what was asked, what was said, and what it adds to the sums of every metric. Examples that
a model's window has no room for are left out, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from actors.sandbox import Outcome, run_program
from actors.store.artifacts import write_durably
from configs.errors import DataError
from configs.schema.tasks import Task, fill
from pipelines.evaluation.items import Item, full_messages, full_prompt
from pipelines.evaluation.responses import Prompt, Responder, Response
from pipelines.evaluation.scoring import Vectors, goodness, prediction, vectors
from pipelines.evaluation.threads import at_once

GROUP = 128
"""Items that a model of ours is asked together, and that are lost together if the run is killed: how answers round
depends on what is computed beside them. Behind an endpoint every item is a group."""


class Row(BaseModel):
    """One item, what was asked and answered, and what it is worth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str
    prompt: str
    """All of it, instruction and examples included."""
    sampling: str
    """JSON; empty where nothing was generated."""
    examples: int = 0
    """How many stood in the prompt."""
    choices: tuple[str, ...]
    references: tuple[str, ...]
    response: Response
    prediction: str
    programs: tuple[str, ...] = ()
    """How each program ended, with the last of its output."""
    goodness: float
    """By the headline metric; more is better."""
    vectors: Vectors


_SCHEMA = pa.schema(
    [
        ("item", pa.string()), ("prompt", pa.string()), ("sampling", pa.string()), ("examples", pa.int64()),
        ("choices", pa.list_(pa.string())), ("references", pa.list_(pa.string())),
        (
            "response",
            pa.struct(
                [
                    ("texts", pa.list_(pa.string())), ("logprobs", pa.list_(pa.float64())),
                    ("tags", pa.list_(pa.string())), ("prompt_tokens", pa.int64()), ("tokens", pa.int64()),
                    ("finish_reason", pa.string()), ("truncated", pa.bool_()), ("error", pa.string()),
                ]
            ),
        ),
        ("prediction", pa.string()), ("programs", pa.list_(pa.string())), ("goodness", pa.float64()),
        ("vectors", pa.map_(pa.string(), pa.list_(pa.float64()))),
    ]
)  # fmt: skip


Groups = Iterable[tuple[int, Sequence[Item]]]
"""Items that are asked together, each group with its number."""
AskGroups = Callable[[Task, Groups, Sequence[Item]], Iterator[tuple[int, list[Row]]]]
"""Gives the rows of each group as they come, given the task, the groups and the examples."""


def ask(
    task: Task,
    items: Sequence[Item],
    examples: Sequence[Item],
    ask_groups: AskGroups,
    kept: Path,
    progress: Callable[[Sequence[Row]], None],
    *,
    group: int | None = None,
) -> list[Row]:
    """A row for each item, in their order; rows that `kept` holds already are not asked for again.

    Args:
        ask_groups: `in_turn` of a model in this process, a `Pool`, or `each_alone` of an endpoint.
        progress: told what was kept already, then the rows of every group.
        group: items that are asked together; `GROUP` unless set.

    Raises:
        ConfigError: the model cannot do the task.
        DataError: a program's template names a field that an item lacks.
    """
    kept.mkdir(parents=True, exist_ok=True)
    size = group or GROUP
    groups = {start: items[start : start + size] for start in range(0, len(items), size)}
    parts = {start: kept / f"{start:08d}.parquet" for start in groups}
    rows = {start: read_rows(part) for start, part in parts.items() if part.exists()}
    progress([row for found in rows.values() for row in found])
    missing = [(start, asked) for start, asked in groups.items() if start not in rows]
    for start, made in ask_groups(task, missing, examples):
        write_durably(parts[start], _encoded(made))
        rows[start] = made
        progress(made)
    return [row for start in groups for row in rows[start]]


def in_turn(responder: Responder) -> AskGroups:
    """Asks one model one group after the other."""

    def ask_groups(task: Task, groups: Groups, examples: Sequence[Item]) -> Iterator[tuple[int, list[Row]]]:
        for number, group in groups:
            yield number, ask_group(task, group, examples, responder)

    return ask_groups


def each_alone(responder: Responder, threads: int) -> AskGroups:
    """Asks a model that is elsewhere some groups at a time, each in a thread of its own."""

    def ask_groups(task: Task, groups: Groups, examples: Sequence[Item]) -> Iterator[tuple[int, list[Row]]]:
        asked = list(groups)
        calls = [partial(ask_group, task, group, examples, responder) for _, group in asked]
        for place, made in at_once(calls, threads):
            yield asked[place][0], made

    return ask_groups


def read_rows(path: Path, *, model: str | None = None, task: str | None = None) -> list[Row]:
    """The rows of a file that `ask` made; of one that `write_rows` made, those of a model and a task."""
    chosen = [("model", "==", model), ("task", "==", task)] if model is not None else None
    table = pq.read_table(path, columns=_SCHEMA.names, filters=chosen)
    return [Row.model_validate({**row, "vectors": dict(row["vectors"])}) for row in table.to_pylist()]


def write_rows(path: Path, rows: Mapping[tuple[str, str], Sequence[Row]]) -> None:
    """All rows of a report in one Parquet file, with columns `model` and `task` before theirs."""
    tables = []
    for (model, task), made in rows.items():
        table = _table(made)
        for position, (name, value) in enumerate((("model", model), ("task", task))):
            table = table.add_column(position, name, pa.array([value] * len(made), pa.string()))
        tables.append(table)
    pq.write_table(pa.concat_tables(tables), path, compression="zstd")


def _encoded(rows: Sequence[Row]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_table(rows), sink, compression="zstd")
    return bytes(sink.getvalue())


def _table(rows: Sequence[Row]) -> Any:
    dumped = [row.model_dump(mode="python") for row in rows]
    for row in dumped:
        row["vectors"] = list(row["vectors"].items())
    return pa.Table.from_pylist(dumped, schema=_SCHEMA)


def ask_group(task: Task, items: Sequence[Item], examples: Sequence[Item], responder: Responder) -> list[Row]:
    """The rows of items that are asked together; raises as `ask` does."""
    prompts, counts = _prompts(task, items, examples, responder)
    responses = _responses(task, items, prompts, responder)
    outcomes = _run_programs(task, items, responses) if task.kind == "code" else [[] for _ in items]
    sampling = task.answering.model_dump_json() if task.generates and not responder.reads_only else ""
    rows = []
    for item, prompt, count, response, ended in zip(items, prompts, counts, responses, outcomes, strict=True):
        found = vectors(task, item, response, [outcome.status == "passed" for outcome in ended])
        rows.append(
            Row(
                item=item.id,
                prompt=_as_text(prompt),
                sampling=sampling,
                examples=count,
                choices=item.choices,
                references=item.references or ((" ".join(item.fields["tags"]),) if task.kind == "entities" else ()),
                response=response,
                prediction=prediction(task, item, response),
                programs=tuple(f"{outcome.status}: {outcome.output}".strip() for outcome in ended),
                goodness=goodness(task, found),
                vectors=found,
            )
        )
    return rows


def _prompts(
    task: Task, items: Sequence[Item], examples: Sequence[Item], responder: Responder
) -> tuple[list[Prompt], list[int]]:
    """What is asked of each item, and how many of the examples have room in it."""
    if task.kind == "language_modelling":
        return [item.prompt for item in items], [0] * len(items)
    if responder.reads_only or task.kind == "entities":
        return [str(item.fields.get("text", item.prompt)) for item in items], [0] * len(items)
    found = [_fitted(task, item, examples, responder) for item in items]
    return [prompt for prompt, _ in found], [count for _, count in found]


def _fitted(task: Task, item: Item, examples: Sequence[Item], responder: Responder) -> tuple[Prompt, int]:
    """The prompt with as many of the last examples as fit; without any if none does."""
    answers = task.answering.max_new_tokens if task.generates else _continuations(task, item, responder)
    for left_out in range(len(examples)):
        prompt = _prompt(task, item, examples[left_out:], responder)
        if responder.fits(prompt, answers):
            return prompt, len(examples) - left_out
    return _prompt(task, item, (), responder), 0


def _prompt(task: Task, item: Item, examples: Sequence[Item], responder: Responder) -> Prompt:
    return full_messages(task, item, examples) if responder.talks else full_prompt(task, item, examples)


def _continuations(task: Task, item: Item, responder: Responder) -> list[str]:
    """The choices as they follow a prompt: in conversations nothing stands between them."""
    return [("" if responder.talks else task.delimiter) + choice for choice in item.choices]


def _as_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _responses(task: Task, items: Sequence[Item], prompts: Sequence[Prompt], responder: Responder) -> list[Response]:
    texts = [_as_text(prompt) for prompt in prompts]
    if task.kind == "language_modelling":
        return responder.documents(texts, task.stride)
    if task.kind == "entities":
        return responder.tag([item.fields["words"] for item in items])
    if task.kind == "classification" and responder.reads_only:
        return responder.classify(texts, items[0].choices)
    if task.generates:
        return responder.generate(prompts, task.answering)
    return responder.likelihoods(
        [(prompt, _continuations(task, item, responder)) for prompt, item in zip(prompts, items, strict=True)]
    )


def _run_programs(task: Task, items: Sequence[Item], responses: Sequence[Response]) -> list[list[Outcome]]:
    def run(item: Item, text: str) -> Outcome:
        try:
            source = fill(task.program.template, {**item.fields, "answer": text})
        except KeyError as error:
            raise DataError(
                f"program.template names a field that item {item.id} has not", received=str(error.args[0]),
                allowed=", ".join([*sorted(item.fields), "answer"]),
            ) from None  # fmt: skip
        return run_program(source, seconds=task.program.seconds, memory_bytes=task.program.memory_bytes)

    with ThreadPoolExecutor(max(1, (cpu_count() or 2) - 1)) as pool:
        ended = [[pool.submit(run, item, text) for text in r.texts] for item, r in zip(items, responses, strict=True)]
        return [[future.result() for future in each] for each in ended]
