"""Stage `tasks`: models scored on tasks that are YAML files; `ganymede evaluate` is this stage for one model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from actors.store.artifacts import Artifact, model_digest
from configs.errors import ConfigError, DataError
from configs.load import load_task
from configs.schema.evaluation import TasksConfig, is_endpoint, stands_alone
from configs.schema.tasks import Task
from pipelines.evaluation.asking import AskGroups, Row, ask, each_alone, in_turn, write_rows
from pipelines.evaluation.endpoints import Endpoint
from pipelines.evaluation.items import Item, SplitName, content_key, load_items, task_digest
from pipelines.evaluation.lineage import check_items
from pipelines.evaluation.local_models import LocalModel
from pipelines.evaluation.page import render
from pipelines.evaluation.stored_report import REPORT
from pipelines.evaluation.task_picture import PICTURE, task_picture
from pipelines.evaluation.task_report import (
    ANSWERS,
    PAGE,
    ModelReport,
    RunningScore,
    Scores,
    TaskFacts,
    TasksReport,
    scores,
    task_facts,
)
from pipelines.stage import Progress, StageContext


@dataclass(frozen=True)
class _Asked:
    """A task with what every model is asked of it."""

    task: Task
    facts: TaskFacts
    items: list[Item]
    examples: list[Item]


class TasksStage:
    """Publishes report.json, report.html, scores.png and answers.parquet (every prompt, answer and score)."""

    kind: ClassVar[str] = "tasks"
    artifact_kind: ClassVar[str | None] = "report"
    code_version: ClassVar[int] = 3

    def sources(self, config: TasksConfig) -> Mapping[str, str]:
        """Digests of the tasks with their data, and of the models that are no artifacts.

        Raises:
            ConfigError: two tasks have one name, or an endpoint has no such model.
            DataError: a task's data is not there.
            EngineError: an endpoint does not answer.
        """
        found = {f"tasks.{name}": task_digest(task, *_splits(config)) for name, task in _tasks(config).items()}
        for label, model in config.models.items():
            if is_endpoint(model):
                found[f"models.{label}"] = str(_endpoint(model, config).facts()["digest"])
            elif stands_alone(model):
                found[f"models.{label}"] = model_digest(Path(model).expanduser())
        return found

    def run(self, config: TasksConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Asks one model after the other; answers that a killed run got are not asked for again.

        Raises:
            ConfigError: a model cannot do a task.
            DataError: a task's data cannot be used, or a model learned from it.
        """
        asked = {name: _asked(task, config) for name, task in _tasks(config).items()}
        artifacts = {label: inputs.get(f"models.{label}") for label in config.models}
        known = {
            (label, name): {} if artifact is None else check_items(label, artifact, context.store, name, one.items)
            for label, artifact in artifacts.items()
            for name, one in asked.items()
        }
        rows: dict[tuple[str, str], list[Row]] = {}
        models: dict[str, ModelReport] = {}
        speeds: dict[str, dict[str, float]] = {}
        for label in config.models:
            results: dict[str, Scores] = {}
            with _opened(config, label, artifacts[label]) as (ask_groups, facts):
                for name, one in asked.items():
                    group = 1 if is_endpoint(config.models[label]) else None
                    rows[label, name], speeds[f"{label}/{name}"] = _ask(ask_groups, label, name, one, context, group)
                    results[name] = scores(one.task, rows[label, name], known[label, name], len(one.examples))
                models[label] = ModelReport(facts=facts(), tasks=results)
        if config.price_per_hour is not None:
            for speed in speeds.values():
                if speed["asked_now"]:
                    speed["cost_per_1000_items"] = round(config.price_per_hour / 3.6 / speed["items_per_second"], 4)
        report = TasksReport(tasks={name: one.facts for name, one in asked.items()}, models=models)
        report.save(context.out)
        (context.out / PICTURE).write_bytes(task_picture(report))
        (context.out / PAGE).write_text(render(report, rows), encoding="utf-8")
        write_rows(context.out / ANSWERS, rows)
        _track(report, rows, speeds, context)
        return {
            "models": {label: _figures(model) for label, model in models.items()},
            "speed": speeds,
        }


def _tasks(config: TasksConfig) -> dict[str, Task]:
    found: dict[str, Task] = {}
    for reference in config.tasks:
        name = Path(reference).stem
        if name in found:
            raise ConfigError(
                "two tasks have one name in the report", received=name, allowed="files with names of their own"
            )
        found[name] = load_task(reference)
    return found


def _splits(config: TasksConfig) -> tuple[SplitName, ...]:
    """The parts of the data that are read."""
    return ("evaluation", "train") if config.shots else ("evaluation",)


def _asked(task: Task, config: TasksConfig) -> _Asked:
    everything = load_items(task)
    items = everything
    if config.limit is not None:
        first = {item.id for item in sorted(everything, key=lambda item: item.id)[: config.limit]}
        items = [item for item in everything if item.id in first]
    examples = _examples(task, everything, config)
    digest = task_digest(task, *_splits(config))
    facts = task_facts(
        task, digest, items=len(everything), asked=len(items), examples=[e.id for e in examples], chat=config.chat
    )
    return _Asked(task, facts, items, examples)


def _examples(task: Task, scored: Sequence[Item], config: TasksConfig) -> list[Item]:
    """Examples of the training split, drawn with the seed; none asks what an item asks that is scored."""
    if not config.shots or task.kind in ("language_modelling", "entities"):
        return []
    if not scored[0].references:
        raise ConfigError(
            "examples are shown with their answers, and the task says of none", received=f"{config.shots} shots",
            allowed="a task with answer", next_step="add answer to the task's file, or ask for no shots",
        )  # fmt: skip
    asked = {content_key(item) for item in scored}
    found = sorted((i for i in load_items(task, "train") if content_key(i) not in asked), key=lambda item: item.id)
    if len(found) < config.shots:
        raise DataError(
            "the training split has too few examples", received=len(found), allowed=f"at least {config.shots}",
            next_step="ask for fewer shots",
        )  # fmt: skip
    return random.Random(config.seed).sample(found, config.shots)


def _endpoint(model: str, config: TasksConfig) -> Endpoint:
    url, _, name = model.partition("#")
    return Endpoint(url, name, chat=config.chat, parallel=config.parallel)


@contextmanager
def _opened(
    config: TasksConfig, label: str, artifact: Artifact | None
) -> Iterator[tuple[AskGroups, Callable[[], dict[str, Any]]]]:
    """How to ask a model, and how to get what the report says of it."""
    model = config.models[label]
    if artifact is None and is_endpoint(model):
        endpoint = _endpoint(model, config)
        yield each_alone(endpoint, config.parallel), endpoint.facts
        return
    folder = Path(model).expanduser().absolute() if artifact is None else artifact.path
    if config.replicas == 1:
        loaded = LocalModel.load(folder, max_sequences=config.max_sequences, chat=config.chat)
        yield in_turn(loaded), loaded.facts
        return
    from pipelines.evaluation.pool import Pool  # brings Ray, which one copy does without

    with Pool(folder, replicas=config.replicas, max_sequences=config.max_sequences, chat=config.chat) as pool:
        yield pool.ask_groups, pool.facts


def _ask(
    ask_groups: AskGroups, label: str, name: str, asked: _Asked, context: StageContext, group: int | None
) -> tuple[list[Row], dict[str, float]]:
    began = time.monotonic()
    running = RunningScore(asked.task)
    kept_already: list[int] = []

    def progress(rows: Sequence[Row]) -> None:
        context.check_lease()
        running.add(rows)
        kept_already.append(running.items)
        figures = {"score": running.score} if running.items else {}
        context.progress(Progress(running.items, len(asked.items), f"items of {name}", figures))

    kept = context.work / "answers" / label / name
    rows = ask(asked.task, asked.items, asked.examples, ask_groups, kept, progress, group=group)
    seconds = time.monotonic() - began
    new = len(rows) - kept_already[0]
    return rows, {
        "asked_now": new,
        "items_per_second": round(new / max(seconds, 1e-9), 2),
        "prompt_tokens": sum(row.response.prompt_tokens for row in rows),
        "tokens": sum(row.response.tokens for row in rows),
    }


def _figures(model: ModelReport) -> dict[str, dict[str, float]]:
    return {name: {metric: s.value for metric, s in one.scores.items()} for name, one in model.tasks.items()}


def _track(
    report: TasksReport,
    rows: Mapping[tuple[str, str], Sequence[Row]],
    speeds: Mapping[str, Mapping[str, float]],
    context: StageContext,
) -> None:
    for name, facts in report.tasks.items():
        context.run.log_dataset(
            name=name, digest=facts.digest, uri=name, context="evaluation", profile={"items": facts.asked}
        )
    figures = {
        f"{label}/{name}/{metric}".replace("@", "_at_"): score.value
        for label, model in report.models.items()
        for name, one in model.tasks.items()
        for metric, score in one.scores.items()
    }
    speed = {f"{name}/{figure}": value for name, found in speeds.items() for figure, value in found.items()}
    context.run.log_metrics({**figures, **speed}, step=0)
    context.run.log_file(context.out / PAGE)
    context.run.log_file(context.out / PICTURE)
    context.run.log_file(context.out / REPORT)
    table = [
        {
            "model": label, "task": name, "item": row.item, "prompt": row.prompt, "answer": row.prediction,
            "reference": "\n".join(row.references), "score": row.goodness, "error": row.response.error or "",
        }
        for (label, name), made in rows.items()
        for row in made
    ]  # fmt: skip
    context.run.log_table(table, "answers.json")
