"""What the stage `tasks` writes: scores of models by task, with all that a number needs to be compared with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from configs.schema.tasks import Kind, Task
from pipelines.evaluation.asking import Row
from pipelines.evaluation.items import template_digest
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
    template: str
    """Digest of the task's template: instruction, prompt and what stands between the parts."""
    chat: bool
    """Whether it was asked through the chat template, whose digest is in each model's text contract."""
    metrics: dict[str, str]
    """How each score is made, the headline first."""


class Scores(Record):
    """What one model reached on one task."""

    scores: dict[str, Estimate]
    failed: int
    """Items without an answer; they count as wrong."""
    fewer_examples: int
    """Items with fewer examples than asked for, as the window had no room for more."""
    examples_shown: float
    """Mean over the items."""
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
    format: Literal[2] = 2
    tasks: dict[str, TaskFacts]
    models: dict[str, ModelReport]


def scores(task: Task, rows: Sequence[Row], lineage: Mapping[str, str], examples: int) -> Scores:
    """The scores of at least one row, with intervals; `examples` were to be shown to each."""
    found = [row.vectors for row in rows]
    return Scores(
        scores={metric: estimate(stack(found, metric), combine(metric)) for metric in task.scores},
        failed=sum(row.response.error is not None for row in rows),
        fewer_examples=sum(row.examples < examples for row in rows),
        examples_shown=round(sum(row.examples for row in rows) / len(rows), 4),
        truncated=sum(row.response.truncated for row in rows),
        unfinished=sum(row.response.finish_reason == "length" for row in rows),
        lineage=dict(lineage),
    )


class RunningScore:
    """The headline score of the rows so far."""

    def __init__(self, task: Task) -> None:
        self.items = 0
        self._metric = task.scores[0]
        self._total: Any = 0.0

    def add(self, rows: Sequence[Row]) -> None:
        """Counts more rows in."""
        if rows:
            self.items += len(rows)
            self._total = self._total + stack([row.vectors for row in rows], self._metric).sum(0)

    @property
    def score(self) -> float:
        """Of at least one row."""
        return combine(self._metric)(self._total)


def task_facts(task: Task, digest: str, *, items: int, asked: int, examples: Sequence[str], chat: bool) -> TaskFacts:
    """What a report says of a task."""
    return TaskFacts(
        kind=task.kind,
        description=task.description,
        digest=digest,
        items=items,
        asked=asked,
        examples=tuple(examples),
        template=template_digest(task),
        chat=chat,
        metrics={metric: signature(metric) for metric in task.scores},
    )
