"""`ganymede evaluate`: a model's scores on tasks. `ganymede compare`: whether one is better than another.
`ganymede judge`: which of two a third one prefers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.alone import label_of, model_reference, run_alone
from infra.cli.models import MODEL_HELP
from infra.cli.output import Debug, Json, Tracker, print_json, print_table, say
from infra.local import ray_session, route_logs, state_home

if TYPE_CHECKING:
    from actors.store.artifacts import Artifact
    from pipelines.evaluation.comparing import Comparison
    from pipelines.evaluation.task_report import TasksReport

_PROJECT = "evaluate"


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
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Requests in flight to the endpoint.")] = 8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in conversations, by the chat template; examples are turns.")
    ] = False,
    replicas: Annotated[
        int, typer.Option(min=1, help="Copies of the model that share the items, in processes of the Ray cluster.")
    ] = 1,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What the machines cost an hour: tells the cost of 1,000 items.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which examples are drawn.")] = 0,
    tracker: Tracker = "mlflow",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Scores a model on tasks. What a killed run asked is not asked again. Example: ganymede evaluate demo@champion
    --task sst2 --shots 4.

    Packaged tasks: demo_signatures and demo_summaries, which need no data; dialogsum, gsm8k, hh_helpful, instructions,
    mbpp, multi30k_fr_en, preferences, squad, sst2, wikitext2 and wnut17, whose data is found below $GANYMEDE_DATA. A
    report is published as report/evaluate-MODEL@N with report.json, scores.png, report.html (every item, errors and
    the worst first) and answers.parquet.
    """
    home = state_home()
    route_logs(home)
    from actors.store.artifacts import ArtifactStore

    label, reference = _reference(model, endpoint, home)
    stage = {"kind": "tasks", "models": {label: reference}, "tasks": task, "shots": shots, "limit": limit, "chat": chat,
             "seed": seed, "replicas": replicas, "parallel": parallel, "price_per_hour": price_per_hour}  # fmt: skip
    with ray_session(home) if replicas > 1 else nullcontext():
        outcome = run_alone(_PROJECT, label, stage, home, tracker)
    artifact = ArtifactStore(home / "artifacts").get(str(outcome.ref))
    from pipelines.evaluation.task_report import PAGE, TasksReport

    report = TasksReport.load(artifact.path)
    registered = _record(report, artifact, home) if tracker == "mlflow" and endpoint is None else []
    if as_json:
        found = {"report": str(artifact.ref), "digest": artifact.digest, "folder": str(artifact.path)}
        print_json({**found, "status": outcome.status, **report.model_dump(mode="json"), "summary": outcome.summary,
                    "registered": registered})  # fmt: skip
        return
    _show(report)
    for name, speed in outcome.summary["speed"].items():
        if speed["asked_now"]:
            cost = f", {speed['cost_per_1000_items']:g} for 1,000" if "cost_per_1000_items" in speed else ""
            say(f"{name}: {speed['items_per_second']:g} items a second{cost}")
    for version in registered:
        say(f"scores entered on the card of {version}")
    say(f"{outcome.status} {artifact.ref}: {artifact.path / PAGE}")


def _record(report: TasksReport, artifact: Artifact, home: Path) -> list[str]:
    """Enters the scores on the cards of the model's registered versions; which these are."""
    from actors.store.registry import Registry
    from actors.store.tracker import tracking_uri

    registry = Registry.open(tracking_uri(home))
    found: list[str] = []
    for label, model in report.models.items():
        made_from = artifact.manifest.inputs.get(f"models.{label}")
        if made_from is not None:
            scores = {
                f"{task}.{metric}": f"{score.value:g} ({score.low:g} to {score.high:g}), {artifact.ref}"
                for task, one in model.tasks.items()
                for metric, score in one.scores.items()
            }
            found += map(str, registry.record_scores(made_from.digest, scores))
    return found


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


def judge(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A report, report/NAME@VERSION; of several models, :MODEL.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The report of the same task that is held against A.")],
    task: Annotated[
        str, typer.Option("--task", "-t", metavar="TASK", help="A task of both whose answers are written.")
    ],
    by: Annotated[str, typer.Option("--by", metavar="MODEL", help="The judge: a chat model of the endpoint.")],
    endpoint: Annotated[
        str,
        typer.Option(metavar="URL", help="OpenAI-compatible endpoint: http://127.0.0.1:8000/v1. Key: $OPENAI_API_KEY."),
    ],
    criterion: Annotated[
        str | None, typer.Option(help="What the judge is asked, instead of which serves better.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Judge this many items.")] = None,
    tracker: Tracker = "mlflow",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Lets a model judge which of two others answers better. Example: ganymede judge report/evaluate-a@1
    report/evaluate-b@1 --task dialogsum --by gpt-oss --endpoint http://127.0.0.1:8000/v1.

    Every pair of answers is shown in both orders; a model wins an item if both verdicts are for it, all else is a tie.
    What a killed run asked is not asked again. A judge is no measurement: look at how often its two verdicts agree, and
    how often it took the answer that stood first (0.5 is even).
    """
    home = state_home()
    route_logs(home)
    from actors.store.artifacts import ArtifactStore
    from pipelines.evaluation.judging import JudgeReport

    (a, _, a_model), (b, _, b_model) = first.partition(":"), second.partition(":")
    stage = {"kind": "judge", "first": a, "second": b, "first_model": a_model or None, "second_model": b_model or None,
             "task": task, "judge": f"{endpoint.rstrip('/')}#{by}", "limit": limit}  # fmt: skip
    stage |= {} if criterion is None else {"criterion": criterion}
    outcome = run_alone("judge", label_of(task), stage, home, tracker)
    artifact = ArtifactStore(home / "artifacts").get(str(outcome.ref))
    report = JudgeReport.load(artifact.path)
    if as_json:
        print_json({"report": str(artifact.ref), "folder": str(artifact.path), "status": outcome.status,
                    **report.model_dump(mode="json")})  # fmt: skip
        return
    result = report.share
    interval = f"{result.difference.low:+.3f} to {result.difference.high:+.3f}"
    print_table(
        ["# items", "# A wins", "# B wins", "# ties", "# B - A", "95 % interval", "# p", "verdict"],
        [[str(report.items), str(report.wins[0]), str(report.wins[1]), str(report.ties),
          f"{result.difference.value:+.3f}", interval, f"{result.p_value:.3f}", result.verdict]],
    )  # fmt: skip
    say(
        f"{report.identical} equal answers, {report.unjudged} without a verdict; its two verdicts agree on "
        f"{_share(report.agreement)} (kappa {_share(report.kappa)}), the answer shown first was taken "
        f"{_share(report.shown_first)}"
    )
    say(f"{outcome.status} {artifact.ref}: {artifact.path}")


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _reference(model: str, endpoint: str | None, home: Path) -> tuple[str, str]:
    """What the report calls the model, and what the stage is told."""
    if endpoint is not None:
        return label_of(model), f"{endpoint.rstrip('/')}#{model}"
    return model_reference(model, home)


def _show(report: TasksReport) -> None:
    rows = []
    for label, model in report.models.items():
        for name, one in model.tasks.items():
            asked = report.tasks[name].asked
            for metric, score in one.scores.items():
                figures = [f"{score.value:.4f}", f"{score.low:.4f} to {score.high:.4f}"]
                rows.append([label, name, metric, *figures, str(asked), str(one.failed)])
    print_table(["model", "task", "metric", "# score", "95 % interval", "# items", "# no answer"], rows)
    for model in report.models.values():
        for name, one in model.tasks.items():
            if one.fewer_examples:
                say(f"{name}: the window had no room for all examples of {one.fewer_examples} items; "
                    f"{one.examples_shown:.3g} were shown on average")  # fmt: skip
            if one.truncated:
                say(f"{name}: {one.truncated} items were longer than the window and lost their beginning")


def _row(one: Comparison) -> list[str]:
    result = one.result
    interval = f"{result.difference.low:+.4f} to {result.difference.high:+.4f}"
    figures = [f"{result.first:.4f}", f"{result.second:.4f}", f"{result.difference.value:+.4f}", interval]
    changed = [str(len(one.better)), str(len(one.worse))]
    return [one.task, one.metric, *figures, f"{result.p_value:.3f}", result.verdict, *changed]
