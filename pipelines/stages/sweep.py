"""Stage `sweep`: what prompting is worth, next to models that were trained for the task."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.engine.engine import Engine
from actors.engine.loading import runner_kind
from actors.store.artifacts import Artifact, model_digest
from configs.errors import ConfigError
from configs.load import load_task, load_template
from configs.schema.model import is_folder
from configs.schema.prompting import PromptTemplate, SweepConfig
from configs.schema.tasks import Task
from pipelines.evaluation.asking import ask, in_turn
from pipelines.evaluation.items import Item, SplitName, load_items, task_digest
from pipelines.evaluation.lineage import check_items
from pipelines.evaluation.local_models import LocalModel
from pipelines.evaluation.resampling import compare, estimate
from pipelines.evaluation.scoring import LOWER_IS_BETTER, Vectors, combine, signature, stack
from pipelines.evaluation.stored_report import REPORT
from pipelines.prompting.cells import Answer, Way, ask_way
from pipelines.prompting.encoding import open_encoder
from pipelines.prompting.examples import Chooser, Pool
from pipelines.prompting.sweep_picture import sweep_picture
from pipelines.prompting.sweep_report import Cell, Reference, Series, SweepReport, best_cell, recommend
from pipelines.stage import Progress, StageContext

ANSWERS, PICTURE = "answers.parquet", "sweep.png"


@dataclass(frozen=True)
class _Sweep:
    """What every model is asked."""

    task: Task
    items: list[Item]
    pool: Pool
    chooser: Chooser | None
    """None if no examples are shown."""
    templates: dict[str, PromptTemplate]
    metric: str


@dataclass(frozen=True)
class _Asked:
    """A way to ask a model, and its answers."""

    model: str
    sampling: str
    way: Way
    answers: list[Answer]

    @property
    def name(self) -> str:
        return f"{self.model}/{self.way.template.name}/{self.sampling}/{self.way.shots}"


class SweepStage:
    """Publishes report.json, sweep.png and answers.parquet (every prompt and answer of every cell)."""

    kind: ClassVar[str] = "sweep"
    artifact_kind: ClassVar[str | None] = "report"
    code_version: ClassVar[int] = 2

    def sources(self, config: SweepConfig) -> Mapping[str, str]:
        """Digests of the task with its data, of the templates, and of the models that are no artifacts.

        Raises:
            ConfigError: the task or a template cannot be read.
            DataError: the task's data is not there.
            ArtifactError: a folder holds no model.
        """
        task = load_task(config.task)
        found = {"task": task_digest(task, *_splits(config))}
        found |= {f"templates.{t.name}": t.digest for t in _templates(config, task).values()}
        named = {f"models.{label}": model for label, model in config.models.items()}
        named |= {f"references.{label}": model for label, model in config.references.items()}
        found |= {role: model_digest(Path(m).expanduser()) for role, m in named.items() if is_folder(m)}
        if config.examples.encoder is not None:
            found["examples.encoder"] = model_digest(Path(config.examples.encoder).expanduser())
        return found

    def run(self, config: SweepConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Asks one model after the other in every way; what a killed run asked is not asked again.

        Raises:
            ConfigError: a model or the task cannot be prompted.
            DataError: a model learned from the task's items, or there are no examples.
            RequestError: a model has no chat template.
        """
        sweep = _prepare(config)
        folders = _folders(config, inputs, context, sweep)
        began = time.monotonic()
        asked = list(_ask_all(config, sweep, folders, context))
        trained = {label: _ask_reference(config, sweep, folders[label], label, context) for label in config.references}
        report = _report(config, sweep, asked, trained)
        advice = recommend(report)
        report.save(context.out)
        (context.out / PICTURE).write_bytes(sweep_picture(report))
        _write_answers(context.out / ANSWERS, asked)
        _track(report, asked, context)
        answers = [answer for one in asked for answer in one.answers]
        return {
            "cells": len(report.cells),
            "items": report.items,
            "best": report.cells[report.best].name,
            report.metric: report.cells[report.best].score.value,
            "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
            "prompt_tokens_cached": sum(answer.cached_tokens for answer in answers),
            "recommendation": advice.model_dump(mode="json"),
            "seconds": round(time.monotonic() - began, 1),
        }


def _splits(config: SweepConfig) -> tuple[SplitName, ...]:
    """The parts of the data that are read."""
    return ("evaluation", "train") if config.shots[-1] else ("evaluation",)


def _prepare(config: SweepConfig) -> _Sweep:
    task = load_task(config.task)
    if task.kind not in ("classification", "multiple_choice", "generation"):
        raise ConfigError(
            "this task cannot be swept over prompts", received=f"kind {task.kind}",
            allowed="classification, multiple_choice, generation",
        )  # fmt: skip
    everything = load_items(task)
    items = everything
    if config.limit is not None:
        chosen = {item.id for item in sorted(everything, key=lambda item: item.id)[: config.limit]}
        items = [item for item in everything if item.id in chosen]
    pool, chooser = Pool((), 0), None
    if "train" in _splits(config):
        encoder = config.examples.encoder
        pool = Pool.of(load_items(task, "train"), everything)
        chooser = Chooser(config.examples, pool, open_encoder(Path(encoder).expanduser()) if encoder else None)
    metric = next(m for m in task.scores if m not in LOWER_IS_BETTER)
    return _Sweep(task, items, pool, chooser, _templates(config, task), metric)


def _templates(config: SweepConfig, task: Task) -> dict[str, PromptTemplate]:
    """By name. Raises `ConfigError` if two files give one name."""
    found: dict[str, PromptTemplate] = {}
    for reference in config.templates:
        template = load_template(reference, task)
        if template.name in found:
            raise ConfigError("templates: two have one name", received=template.name, allowed="names of their own")
        found[template.name] = template
    return found


def _folders(
    config: SweepConfig, inputs: Mapping[str, Artifact], context: StageContext, sweep: _Sweep
) -> dict[str, Path]:
    """Where each model is; none that learned from what is scored."""
    folders: dict[str, Path] = {}
    for role, models in (("models", config.models), ("references", config.references)):
        for label, model in models.items():
            artifact = inputs.get(f"{role}.{label}")
            if artifact is not None:
                check_items(label, artifact, context.store, Path(config.task).stem, sweep.items)
            folders[label] = Path(model).expanduser().absolute() if artifact is None else artifact.path
    for label in config.models:
        if runner_kind(folders[label]) != "decoder":
            raise ConfigError(
                f"models.{label} cannot be prompted", received=runner_kind(folders[label]), allowed="decoders",
                next_step="name it among references",
            )  # fmt: skip
    return folders


def _ask_all(
    config: SweepConfig, sweep: _Sweep, folders: Mapping[str, Path], context: StageContext
) -> Iterator[_Asked]:
    ways = list(itertools.product(sweep.templates.values(), config.sampling, config.shots))
    total = len(config.models) * len(ways) * len(sweep.items)
    done = 0
    for label in config.models:
        engine = Engine.load(folders[label], max_sequences=config.max_sequences)
        for template, sampling, shots in ways:
            way = Way(template, shots, config.sampling[sampling], config.chat, config.held_to_choices)

            def progress(answers: Sequence[Answer], before: int = done) -> None:
                context.check_lease()
                figures = {"score": _score([a.vectors for a in answers], sweep.metric).value}
                context.progress(Progress(before + len(answers), total, "answers", figures))

            kept = context.work / "answers" / label / template.name / sampling / str(shots)
            answers = ask_way(engine, sweep.task, sweep.items, way, sweep.chooser, kept, progress)
            done += len(answers)
            yield _Asked(label, sampling, way, answers)
        del engine


def _ask_reference(
    config: SweepConfig, sweep: _Sweep, folder: Path, label: str, context: StageContext
) -> tuple[list[Vectors], int]:
    """What each item adds to the sums, and how many have no answer."""
    model = LocalModel.load(folder, max_sequences=config.max_sequences, chat=False)
    kept = context.work / "references" / label
    rows = ask(sweep.task, sweep.items, [], in_turn(model), kept, lambda _: context.check_lease())
    return [row.vectors for row in rows], sum(row.response.error is not None for row in rows)


def _score(rows: Sequence[Vectors], metric: str) -> Any:
    return estimate(stack(rows, metric), combine(metric))


def _report(
    config: SweepConfig, sweep: _Sweep, asked: Sequence[_Asked], trained: Mapping[str, tuple[list[Vectors], int]]
) -> SweepReport:
    metric = sweep.metric
    cells = tuple(_cell(one, metric) for one in asked)
    best = best_cell(cells)
    won = cells[best]
    alike = {
        cell.shots: stack([a.vectors for a in one.answers], metric)
        for cell, one in zip(cells, asked, strict=True)
        if (cell.model, cell.template, cell.sampling) == (won.model, won.template, won.sampling)
    }
    return SweepReport(
        task=Path(config.task).stem,
        metric=metric,
        signature=signature(metric),
        items=len(sweep.items),
        strategy=config.examples.strategy,
        left_out=sweep.pool.left_out,
        templates={name: template.digest for name, template in sweep.templates.items()},
        cells=cells,
        best=best,
        series=Series(
            shots=tuple(alike),
            gains=tuple(
                (fewer, more, compare(alike[fewer], alike[more], combine(metric)))
                for fewer, more in itertools.combinations(alike, 2)
            ),
        ),
        references={
            label: Reference(
                score=_score(rows, metric),
                unanswered=unanswered,
                against_best=compare(alike[won.shots], stack(rows, metric), combine(metric)),
            )
            for label, (rows, unanswered) in trained.items()
        },
        target=config.target,
    )


def _cell(asked: _Asked, metric: str) -> Cell:
    answers = asked.answers
    return Cell(
        model=asked.model,
        template=asked.way.template.name,
        shots=asked.way.shots,
        sampling=asked.sampling,
        score=_score([a.vectors for a in answers], metric),
        shown=round(float(np.mean([len(a.examples) for a in answers])), 4),
        cut_items=sum(len(a.examples) < asked.way.shots for a in answers),
        unanswered=sum(a.error is not None for a in answers),
        prompt_tokens=sum(a.prompt_tokens for a in answers),
    )


def _write_answers(path: Path, asked: Sequence[_Asked]) -> None:
    rows = [
        {
            "model": one.model, "template": one.way.template.name, "shots": one.way.shots, "sampling": one.sampling,
            **answer.model_dump(exclude={"vectors", "cached_tokens"}),
        }
        for one in asked
        for answer in one.answers
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def _track(report: SweepReport, asked: Sequence[_Asked], context: StageContext) -> None:
    for cell in report.cells:
        name = f"{cell.model}/{cell.template}/{cell.sampling}/{report.metric}"
        context.run.log_metrics({name: cell.score.value}, step=cell.shots)
    context.run.log_metrics(
        {f"{label}/{report.metric}": one.score.value for label, one in report.references.items()}, step=0
    )
    context.run.log_file(context.out / PICTURE)
    context.run.log_file(context.out / REPORT)
    context.run.log_table([_table_row(cell, report) for cell in report.cells], "sweep.json")
    best = asked[report.best].answers
    context.run.log_table(
        [{"item": a.item, "prompt": a.prompt, "answer": a.text, "reference": "\n".join(a.references)} for a in best],
        "best_answers.json",
    )


def _table_row(cell: Cell, report: SweepReport) -> dict[str, Any]:
    score = {report.metric: cell.score.value, "low": cell.score.low, "high": cell.score.high}
    return {**cell.model_dump(exclude={"score"}), **score}
