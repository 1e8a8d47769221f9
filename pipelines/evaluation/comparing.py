"""Two models on the same items, by task or by held-out pair: what got better, what got worse, and what is noise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from configs.errors import ConfigError, DataError
from pipelines.evaluation.asking import Row, read_rows
from pipelines.evaluation.report import PAIRS
from pipelines.evaluation.resampling import Difference, compare, mean
from pipelines.evaluation.scoring import LOWER_IS_BETTER, combine, stack
from pipelines.evaluation.task_report import ANSWERS, TaskFacts, TasksReport


class Comparison(BaseModel):
    """One metric of one task, and the items that changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metric: str
    items: int
    result: Difference
    better: tuple[str, ...]
    """Items that the second model answered better, by the headline metric."""
    worse: tuple[str, ...]


def compare_reports(first: Path, second: Path, labels: tuple[str | None, str | None]) -> list[Comparison]:
    """Every metric of every task that both reports have.

    Args:
        first: folder of a report of tasks, like `second`.
        labels: the model of each that is compared; None where a report has but one.

    Raises:
        ConfigError: a report has no such model, or several and none is named.
        DataError: the reports share no task, or a task was not asked alike: other items, prompts or metrics.
    """
    found: list[Comparison] = []
    for task, facts, before, after in asked_alike(first, second, labels):
        found += [_comparison(task, metric, before, after) for metric in facts.metrics]
    return found


def asked_alike(
    first: Path, second: Path, labels: tuple[str | None, str | None]
) -> Iterator[tuple[str, TaskFacts, Mapping[str, Row], Mapping[str, Row]]]:
    """The tasks that both reports have, and each model's rows of them by item; raises as `compare_reports` does."""
    reports = (TasksReport.load(first), TasksReport.load(second))
    models = tuple(_model(report, label) for report, label in zip(reports, labels, strict=True))
    shared = [task for task in reports[0].tasks if task in reports[1].tasks]
    if not shared:
        raise DataError(
            "the reports share no task", received=f"{', '.join(reports[0].tasks)}; {', '.join(reports[1].tasks)}",
            allowed="reports of the same tasks",
        )  # fmt: skip
    for task in shared:
        facts, others = reports[0].tasks[task], reports[1].tasks[task]
        if facts != others:
            changed = [name for name, value in facts if value != getattr(others, name)]
            raise DataError(
                f"{task} was not asked alike, so that its scores do not compare",
                received=", ".join(f"other {name}" for name in changed),
                allowed="reports with the same task, data, limit, examples and template",
                next_step="evaluate both models with the same command",
            )
        yield task, facts, _rows(first, models[0], task), _rows(second, models[1], task)


def compare_task(
    task: str, metrics: Iterable[str], first: tuple[Path, str], second: tuple[Path, str]
) -> list[Comparison]:
    """The metrics of a task that two models, each the folder of a report and a label in it, were asked alike."""
    before, after = (_rows(folder, label, task) for folder, label in (first, second))
    return [_comparison(task, metric, before, after) for metric in metrics]


def compare_answers(folder: Path, first: str, second: str) -> list[Comparison]:
    """Every score of two models of one report by the stage `evaluate`, which asks all models the same pairs."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in (folder / PAIRS).read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        pairs.setdefault((pair["task"], pair["metric"]), []).append(pair)
    found = []
    for (task, metric), asked in pairs.items():
        scores = [[float(pair["answers"][label]["score"]) for pair in asked] for label in (first, second)]
        sums = [np.column_stack([one, np.ones(len(one))]) for one in scores]
        gains = {pair["id"]: after - before for pair, before, after in zip(asked, *scores, strict=True)}
        found.append(
            Comparison(
                task=task,
                metric=metric,
                items=len(asked),
                result=compare(sums[0], sums[1], mean),
                better=tuple(item for item, gain in gains.items() if gain > 0),
                worse=tuple(item for item, gain in gains.items() if gain < 0),
            )
        )
    return found


def _model(report: TasksReport, label: str | None) -> str:
    if label is None and len(report.models) == 1:
        return next(iter(report.models))
    if label not in report.models:
        raise ConfigError(
            "a report of several models needs one of them" if label is None else "the report has no such model",
            received=label, allowed=", ".join(report.models), next_step="write report/NAME@VERSION:MODEL",
        )  # fmt: skip
    return label


def _rows(folder: Path, model: str, task: str) -> Mapping[str, Row]:
    return {row.item: row for row in read_rows(folder / ANSWERS, model=model, task=task)}


def _comparison(task: str, metric: str, before: Mapping[str, Row], after: Mapping[str, Row]) -> Comparison:
    items = list(before)
    first, second = (stack([rows[item].vectors for item in items], metric) for rows in (before, after))
    gains = {item: after[item].goodness - before[item].goodness for item in items}
    return Comparison(
        task=task,
        metric=metric,
        items=len(items),
        result=compare(first, second, combine(metric), lower_is_better=metric in LOWER_IS_BETTER),
        better=tuple(item for item in items if gains[item] > 0),
        worse=tuple(item for item in items if gains[item] < 0),
    )
