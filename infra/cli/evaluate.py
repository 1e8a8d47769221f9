"""`ganymede evaluate`: a model's scores on tasks. `ganymede compare`: whether one is better than another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from infra.cli.models import MODEL_HELP, find_model_folder
from infra.cli.output import Debug, Json, err, print_json, print_table, say
from infra.cli.progress import RunProgress
from infra.cli.run import TRACKER_CLOSE_SECONDS
from infra.local import route_logs, state_home

if TYPE_CHECKING:
    from actors.store.artifacts import ArtifactStore
    from configs.schema.project import Recipe
    from pipelines.evaluation.comparing import Comparison
    from pipelines.evaluation.task_report import TasksReport
    from pipelines.runner import RunReport

_RECIPE = "evaluate"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} With --endpoint, a model's name there.")],
    task: Annotated[
        list[str],
        typer.Option("--task", "-t", metavar="TASK", help="A packaged task (sst2) or a YAML file; can be repeated."),
    ],
    shots: Annotated[int, typer.Option(min=0, help="Examples before each prompt, from the task's train split.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask this many items of each task; the same ones every time.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible endpoint: http://127.0.0.1:8000/v1. Key: $OPENAI_API_KEY."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask prompts as a user of the chat template.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides which examples are drawn.")] = 0,
    tracker: Annotated[
        Literal["mlflow", "jsonl", "none"], typer.Option(help="Where scores go; $MLFLOW_TRACKING_URI is honoured.")
    ] = "mlflow",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Scores a model on tasks. What a killed run asked is not asked again. Example: ganymede evaluate demo@champion
    --task sst2 --shots 4.

    Packaged tasks: dialogsum, gsm8k, instructions, mbpp, multi30k_fr_en, sst2, squad, wikitext2, wnut17. Their data is
    found below $GANYMEDE_DATA. A report is published as report/evaluate-MODEL@N with report.json, report.html (every
    item, the worst first) and answers.parquet.
    """
    home = state_home()
    route_logs(home)
    from actors.store.artifacts import ArtifactStore

    store = ArtifactStore(home / "artifacts")
    label, reference = _reference(model, endpoint, home)
    recipe = _recipe(
        store, label, {"models": {label: reference}, "tasks": task, "shots": shots, "limit": limit, "chat": chat,
                       "seed": seed}
    )  # fmt: skip
    made = _run(recipe, store, home, tracker)
    outcome = made.outcomes[0]
    artifact = store.get(str(outcome.ref))
    from pipelines.evaluation.task_report import PAGE, TasksReport

    report = TasksReport.load(artifact.path)
    if as_json:
        found = {"report": str(artifact.ref), "digest": artifact.digest, "folder": str(artifact.path)}
        print_json({**found, "status": outcome.status, **report.model_dump(mode="json"), "summary": outcome.summary})
        return
    _show(report)
    say(f"{outcome.status} {artifact.ref}: {artifact.path / PAGE}")


def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A report, report/NAME@VERSION; of several models, :MODEL.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The report of the same tasks that is held against A.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tells what B does better than A, what worse, and what is noise. Example: ganymede compare report/evaluate-a@1
    report/evaluate-b@1.

    Both were asked the same items, so that differences are resampled in pairs: a 95 % interval by bootstrap, a p-value
    by approximate randomisation, and `noise` where it is 5 % or more.
    """
    home = state_home()
    route_logs(home)
    from actors.store.artifacts import ArtifactStore
    from pipelines.evaluation.comparing import compare_reports

    store = ArtifactStore(home / "artifacts")
    folders, labels = [], []
    for reference in (first, second):
        ref, _, label = reference.partition(":")
        folders.append(store.get(ref).path)
        labels.append(label or None)
    found = compare_reports(folders[0], folders[1], (labels[0], labels[1]))
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    print_table(
        ["task", "metric", "# A", "# B", "# B - A", "95 % interval", "# p", "verdict", "# items better", "# worse"],
        [_row(one) for one in found],
    )


def _reference(model: str, endpoint: str | None, home: Path) -> tuple[str, str]:
    """What the report calls the model, and what the stage is told."""
    if endpoint is not None:
        return _label(model), f"{endpoint.rstrip('/')}#{model}"
    found = find_model_folder(model, home)
    if found.ref is None:
        return _label(found.folder.resolve().name), str(found.folder.resolve())
    return _label(found.ref.partition("/")[2]), found.ref


def _label(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:40] or "model"


def _recipe(store: ArtifactStore, label: str, stage: dict[str, Any]) -> Recipe:
    """The recipe of one stage; of a version that nothing stands under, unless it is what the stage would make."""
    from pydantic import ValidationError

    from configs.errors import ConfigError
    from configs.schema.project import Recipe

    version = max(store.versions("report", f"{_RECIPE}-{label}"), default=0) + 1
    try:
        return Recipe.model_validate(
            {"name": _RECIPE, "version": version, "stages": {label: {"kind": "tasks", **stage}}}
        )
    except ValidationError as error:
        raise ConfigError(f"the options do not go together: {error.errors()[0]['msg']}") from error


def _run(recipe: Recipe, store: ArtifactStore, home: Path, tracker: Literal["mlflow", "jsonl", "none"]) -> RunReport:
    with RunProgress(err()) as progress:
        from actors.store.tracker import open_tracker
        from infra.stages import STAGES
        from pipelines.runner import Runner

        tracking = open_tracker(tracker, home, recipe.name)
        try:
            return Runner(recipe, store, tracking, home, STAGES, progress).run()
        finally:
            unsent = tracking.close(TRACKER_CLOSE_SECONDS)
            if unsent:
                say(f"{unsent} records wait on disk for the tracking server; the next run sends them")


def _show(report: TasksReport) -> None:
    rows = []
    for label, model in report.models.items():
        for name, one in model.tasks.items():
            asked = report.tasks[name].asked
            for metric, score in one.scores.items():
                figures = [f"{score.value:.4f}", f"{score.low:.4f} to {score.high:.4f}"]
                rows.append([label, name, metric, *figures, str(asked), str(one.failed)])
    print_table(["model", "task", "metric", "# score", "95 % interval", "# items", "# no answer"], rows)


def _row(one: Comparison) -> list[str]:
    result = one.result
    interval = f"{result.difference.low:+.4f} to {result.difference.high:+.4f}"
    figures = [f"{result.first:.4f}", f"{result.second:.4f}", f"{result.difference.value:+.4f}", interval]
    changed = [str(len(one.better)), str(len(one.worse))]
    return [one.task, one.metric, *figures, f"{result.p_value:.3f}", result.verdict, *changed]
