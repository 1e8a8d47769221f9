"""What the stage `tasks` writes: scores of models by task, with all that a number needs to be compared with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from configs.schema.tasks import Kind, Task
from pipelines.evaluation.asking import Row
from pipelines.evaluation.resampling import Estimate, estimate
from pipelines.evaluation.scoring import combine, signature, stack
from pipelines.evaluation.stored_report import Record, StoredReport

ANSWERS = "answers.parquet"
PAGE = "report.html"


class TaskFacts(Record):
    """What was asked, of every model alike."""

    kind: Kind
    description: str
    digest: str
    """Of the task's file without its paths, and of the data."""
    items: int
    asked: int
    """Items that were asked: all, or the limit."""
    examples: tuple[str, ...]
    """Ids of the examples before each prompt."""
    chat: bool
    metrics: dict[str, str]
    """How each score is made, the headline first."""


class Scores(Record):
    """What one model reached on one task."""

    scores: dict[str, Estimate]
    failed: int
    """Items without an answer; they count as wrong."""
    truncated: int
    """Items whose prompt lost its beginning, as it was longer than the window."""
    unfinished: int
    """Answers that were cut off at the most tokens allowed."""
    lineage: dict[str, str]
    """What is known of overlaps, by artifact that the model was made from."""


class ModelReport(Record):
    """One model."""

    facts: dict[str, Any]
    """What ran it, its digest, precision and text contract."""
    tasks: dict[str, Scores]


class TasksReport(StoredReport):
    """Models by task."""

    made_by: ClassVar[str] = "`ganymede evaluate` or a stage of kind tasks"
    format: Literal[1] = 1
    tasks: dict[str, TaskFacts]
    models: dict[str, ModelReport]


def scores(task: Task, rows: Sequence[Row], lineage: Mapping[str, str]) -> Scores:
    """The scores of at least one row, with intervals."""
    found = [row.vectors for row in rows]
    return Scores(
        scores={metric: estimate(stack(found, metric), combine(metric)) for metric in task.scores},
        failed=sum(row.response.error is not None for row in rows),
        truncated=sum(row.response.truncated for row in rows),
        unfinished=sum(row.response.finish_reason == "length" for row in rows),
        lineage=dict(lineage),
    )


def running_score(task: Task, rows: Sequence[Row]) -> float:
    """The headline score of the rows so far."""
    metric = task.scores[0]
    return combine(metric)(stack([row.vectors for row in rows], metric).sum(0))


def task_facts(task: Task, digest: str, *, items: int, asked: int, examples: Sequence[str], chat: bool) -> TaskFacts:
    """What a report says of a task."""
    return TaskFacts(
        kind=task.kind,
        description=task.description,
        digest=digest,
        items=items,
        asked=asked,
        examples=tuple(examples),
        chat=chat,
        metrics={metric: signature(metric) for metric in task.scores},
    )
