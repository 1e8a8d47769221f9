"""What the stage `tasks` writes: scores of models by task, with all that a number needs to be compared with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from configs.errors import CorruptArtifactError
from configs.schema.tasks import Kind, Task
from pipelines.evaluation.asking import Row
from pipelines.evaluation.resampling import Estimate, estimate
from pipelines.evaluation.scoring import combine, signature, stack

REPORT = "report.json"
ANSWERS = "answers.parquet"
PAGE = "report.html"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskFacts(_Record):
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


class Scores(_Record):
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


class ModelReport(_Record):
    """One model."""

    facts: dict[str, Any]
    """What ran it, its digest, precision and text contract."""
    tasks: dict[str, Scores]


class TasksReport(_Record):
    """Models by task. Holds no time and no place: the same models and data give the same bytes."""

    format: Literal[1] = 1
    tasks: dict[str, TaskFacts]
    models: dict[str, ModelReport]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The report of an artifact. Raises `CorruptArtifactError` if it is not one."""
        try:
            return cls.model_validate_json((folder / REPORT).read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptArtifactError(
                f"{folder / REPORT} is no report of tasks: {error}",
                next_step="name a report that `ganymede evaluate` or a stage of kind tasks made",
            ) from error

    def to_json(self) -> str:
        """The text of `report.json`."""
        return self.model_dump_json(indent=2) + "\n"


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
