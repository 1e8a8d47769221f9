"""Asks a model every item of a task once, and keeps each answer on disk as soon as its group is through.

The groups follow from the items alone, and a run that was killed goes on with those that have no answers yet. What is
kept is a row for each item: what was
asked, what was said, and what it adds to the sums of every metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from pipelines.evaluation.items import Item, full_prompt
from pipelines.evaluation.responses import Responder, Response
from pipelines.evaluation.scoring import Vectors, goodness, prediction, vectors

GROUP = 128
"""Items that are asked together, and lost together if the run is killed."""


class Row(BaseModel):
    """One item, what was asked and answered, and what it is worth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str
    prompt: str
    """All of it, instruction and examples included."""
    sampling: str
    """JSON; empty where nothing was generated."""
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
        ("item", pa.string()), ("prompt", pa.string()), ("sampling", pa.string()),
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
) -> list[Row]:
    """A row for each item, in their order; rows that `kept` holds already are not asked for again.

    Args:
        ask_groups: `in_turn` of a model in this process or behind an endpoint, or a `Pool`.
        progress: told the rows so far, after every group.

    Raises:
        ConfigError: the model cannot do the task.
        DataError: a program's template names a field that an item lacks.
    """
    kept.mkdir(parents=True, exist_ok=True)
    groups = {start: items[start : start + GROUP] for start in range(0, len(items), GROUP)}
    parts = {start: kept / f"{start:08d}.parquet" for start in groups}
    rows = {start: read_rows(part) for start, part in parts.items() if part.exists()}

    def done() -> list[Row]:
        return [row for start in groups for row in rows.get(start, ())]

    progress(done())
    missing = [(start, group) for start, group in groups.items() if start not in rows]
    for start, made in ask_groups(task, missing, examples):
        write_durably(parts[start], _encoded(made))
        rows[start] = made
        progress(done())
    return done()


def in_turn(responder: Responder) -> AskGroups:
    """Asks one model one group after the other."""

    def ask_groups(task: Task, groups: Groups, examples: Sequence[Item]) -> Iterator[tuple[int, list[Row]]]:
        for number, group in groups:
            yield number, ask_group(task, group, examples, responder)

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
    if task.kind == "language_modelling":
        prompts = [item.prompt for item in items]
    elif responder.reads_only or task.kind == "entities":
        prompts = [str(item.fields.get("text", item.prompt)) for item in items]
    else:
        prompts = [full_prompt(task, item, examples) for item in items]
    responses = _responses(task, items, prompts, responder)
    outcomes = _run_programs(task, items, responses) if task.kind == "code" else [[] for _ in items]
    sampling = task.answering.model_dump_json() if task.generates and not responder.reads_only else ""
    rows = []
    for item, prompt, response, ended in zip(items, prompts, responses, outcomes, strict=True):
        found = vectors(task, item, response, [outcome.status == "passed" for outcome in ended])
        rows.append(
            Row(
                item=item.id,
                prompt=prompt,
                sampling=sampling,
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


def _responses(task: Task, items: Sequence[Item], prompts: Sequence[str], responder: Responder) -> list[Response]:
    if task.kind == "language_modelling":
        return responder.documents(prompts, task.stride)
    if task.kind == "entities":
        return responder.tag([item.fields["words"] for item in items])
    if task.kind == "classification" and responder.reads_only:
        return responder.classify(prompts, items[0].choices)
    if task.generates:
        return responder.generate(prompts, task.answering)
    continuations = [[task.delimiter + choice for choice in item.choices] for item in items]
    return responder.likelihoods(list(zip(prompts, continuations, strict=True)))


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
