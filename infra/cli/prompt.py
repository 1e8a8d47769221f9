"""`ganymede prompt`: templates, what a model gets of them, and what prompting is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from infra.cli.models import MODEL_HELP, find_model_folder
from infra.cli.output import Debug, Json, Tracker, print_json, print_table, say
from infra.local import route_logs, state_home

if TYPE_CHECKING:
    from configs.prompts import Example
    from configs.schema.prompting import PromptTemplate
    from configs.schema.tasks import Task as TaskFile
    from pipelines.evaluation.items import Item
    from pipelines.prompting.examples import FittedPrompt
    from pipelines.prompting.sweep_report import SweepReport

app = typer.Typer(
    help="Prompt templates: list, show, register; and what prompting is worth.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Template = Annotated[
    str,
    typer.Argument(
        metavar="TEMPLATE",
        help="A packaged template by name, a YAML file, prompts:/NAME/VERSION or task (the task's own).",
    ),
]
Task = Annotated[str, typer.Option(metavar="TASK", help="A packaged task by name, or a YAML file.")]


@app.command("list")
def list_(as_json: Json = False, debug: Debug = False) -> None:
    """Lists the packaged templates with their versions. Example: ganymede prompt list."""
    from configs.load import load_template, packaged_templates

    templates = [load_template(name) for name in packaged_templates()]
    if as_json:
        print_json([{"digest": template.digest, **template.model_dump()} for template in templates])
        return
    print_table(("template", "version", "for"), [(t.name, t.digest, t.description) for t in templates])


@app.command()
def show(
    template: Template,
    task: Task,
    item: Annotated[int, typer.Option(min=0, help="Which item of the task, counted from 0.")] = 0,
    shots: Annotated[int, typer.Option(min=0, help="Examples to put before it.")] = 0,
    strategy: Annotated[
        Literal["fixed", "random", "balanced", "bm25"], typer.Option(help="How examples are chosen.")
    ] = "random",
    seed: Annotated[int, typer.Option(min=0, help="Draws and orders the examples.")] = 0,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Say how many tokens it is, and what fits. " + MODEL_HELP)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a conversation, by the model's chat template.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows the prompt that a template makes of an item of a task, examples and all.

    Examples come from the task's training split, and never hold what is scored. With --model it is the prompt that this
    model gets: examples that do not fit its window beside the item and its answer are left out, whole.

    Example: ganymede prompt show sentiment-question --task sst2 --shots 2
    """
    home = _begin()
    from configs.errors import InputError
    from configs.load import load_task
    from configs.prompts import render_completion, render_messages
    from configs.schema.prompting import ExampleSelection
    from pipelines.evaluation.items import load_items
    from pipelines.prompting.examples import Chooser, Pool

    selection = ExampleSelection(strategy=strategy, seed=seed)
    asked = load_task(task)
    read = _find(template, home, asked)
    items = load_items(asked)
    if item >= len(items):
        raise InputError("--item: the task has no such one", received=item, allowed=f"0 to {len(items) - 1}")
    examples = (
        Chooser(selection, Pool.of(load_items(asked, "train"), items)).choose(items[item], shots) if shots else ()
    )
    facts: dict[str, object] = {"template": read.name, "version": read.digest, "examples": len(examples)}
    if model is not None:
        fitted, room = _fit(model, home, asked, read, items[item], examples, chat=chat)
        examples = fitted.examples
        facts |= {"examples": len(examples), "asked": fitted.asked, "tokens": len(fitted.token_ids), "room": room}
    prompt = (
        render_messages(read, items[item].fields, examples)
        if chat
        else render_completion(read, items[item].fields, examples)
    )
    if as_json:
        print_json({**facts, "prompt": prompt, "answer": items[item].references})
        return
    if isinstance(prompt, str):
        typer.echo(prompt)
    else:
        for message in prompt:
            typer.echo(f"{message['role']}: {message['content']}")
    say("; ".join(f"{name}: {value}" for name, value in facts.items()))


@app.command()
def register(template: Template, as_json: Json = False, debug: Debug = False) -> None:
    """Registers a template in MLflow's prompt registry; one that stands there by content is not registered twice.

    Example: ganymede prompt register prompts/sentiment.yaml
    """
    home = _begin()
    from actors.store.tracker import tracking_uri
    from pipelines.prompting.registration import register_prompt

    found = register_prompt(_find(template, home), tracking_uri(home))
    if as_json:
        print_json({"name": found.name, "version": found.version, "digest": found.digest, "new": found.new,
                    "uri": found.uri})  # fmt: skip
        return
    typer.echo(found.uri)
    say(f"version {found.version}, digest {found.digest}" + ("" if found.new else ", stood already"))


@app.command()
def sweep(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Decoders to prompt. " + MODEL_HELP)],
    task: Task,
    template: Annotated[
        list[str] | None, typer.Option(metavar="TEMPLATE", help="Can be repeated; `task` is the task's own. [task]")
    ] = None,
    shots: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of examples.")] = "0,1,2,3,5,8",
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, max=100.0, help="Can be repeated; 0 is greedy. [0]")
    ] = None,
    strategy: Annotated[
        Literal["fixed", "random", "balanced", "bm25"], typer.Option(help="How examples are chosen.")
    ] = "balanced",
    seed: Annotated[int, typer.Option(min=0, help="Draws and orders the examples, and draws answers.")] = 0,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="A model trained for the task, to compare with; can be repeated."),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="The score that is wanted, as the metric gives it: 0.85.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask this many items, the same ones every time.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the models' chat templates.")] = False,
    free: Annotated[
        bool, typer.Option("--free", help="Let answers be any text; otherwise they are held to the task's choices.")
    ] = False,
    tracker: Tracker = "mlflow",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measures what prompting is worth: models x templates x examples x temperatures, on the items of a task.

    Ends with a recommendation: from how many examples on more do not help, how far the best prompt is from the target
    or from a model that was trained, and whether to prompt, to fine-tune, or to measure more. What a killed sweep asked
    is not asked again. In a recipe it is the stage `sweep`, which has more settings.

    Example: ganymede prompt sweep demo@champion --task sst2 --template task --template sentiment-great --limit 200
    """
    home = _begin()
    from actors.store.artifacts import ArtifactStore
    from infra.cli.alone import model_reference, run_alone
    from pipelines.prompting.sweep_report import SweepReport, recommend

    drawings = {
        "greedy" if value == 0 else f"t{value:g}": {"temperature": value, "seed": seed}
        for value in temperature or [0.0]
    }
    stage = {
        "kind": "sweep", "models": dict(model_reference(model, home) for model in models),
        "references": dict(model_reference(model, home) for model in reference or []), "task": task,
        "templates": template or ["task"], "shots": _numbers(shots), "sampling": drawings,
        "examples": {"strategy": strategy, "seed": seed}, "target": target, "limit": limit, "chat": chat,
        "held_to_choices": not free,
    }  # fmt: skip
    outcome = run_alone("sweep", Path(task).stem, stage, home, tracker)
    artifact = ArtifactStore(home / "artifacts").get(str(outcome.ref))
    report = SweepReport.load(artifact.path)
    advice = recommend(report)
    if as_json:
        print_json({"report": str(artifact.ref), "folder": str(artifact.path), "status": outcome.status,
                    **report.model_dump(mode="json"), "recommendation": advice.model_dump(mode="json")})  # fmt: skip
        return
    _print_sweep(report)
    for sentence in advice.sentences:
        typer.echo(sentence)
    say(f"{outcome.status} {artifact.ref}: {artifact.path / 'sweep.png'}")


def _fit(
    model: str,
    home: Path,
    task: TaskFile,
    template: PromptTemplate,
    item: Item,
    examples: Sequence[Example],
    *,
    chat: bool,
) -> tuple[FittedPrompt, int]:
    """The prompt that a model gets, and the tokens that its window has for one beside the answer."""
    from actors.engine.engine import Engine
    from configs.schema.prompting import Drawing
    from pipelines.prompting.cells import Way, sampling_of
    from pipelines.prompting.examples import fit_prompt

    engine = Engine.load(find_model_folder(model, home).folder, max_sequences=1)
    way = Way(template, len(examples), Drawing(), chat=chat, held_to_choices=True)
    room = engine.context_length - sampling_of(task, item, way).max_new_tokens
    return fit_prompt(engine.text, template, item, examples, chat=chat, room=room), room


def _numbers(shots: str) -> list[int]:
    from configs.errors import ConfigError

    parts = shots.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError("--shots takes numbers apart by commas", received=shots, allowed="for example 0,1,3")
    return [int(part) for part in parts]


def _print_sweep(report: SweepReport) -> None:
    rows = [
        (
            c.model, c.template, c.sampling, str(c.shots), f"{report.points(c.score.value):.1f}",
            f"{report.points(c.score.low):.1f} to {report.points(c.score.high):.1f}", f"{c.shown:g}",
            f"{c.prompt_tokens / report.items:.0f}", str(c.unanswered), "best" if n == report.best else "",
        )
        for n, c in enumerate(report.cells)
    ]  # fmt: skip
    rows += [
        (label, "trained", "", "", f"{report.points(one.score.value):.1f}",
         f"{report.points(one.score.low):.1f} to {report.points(one.score.high):.1f}", "", "", str(one.unanswered), "")
        for label, one in report.references.items()
    ]  # fmt: skip
    columns = ("model", "template", "sampling", "# shots", f"# {report.metric}", "95 % interval", "# shown",
               "# prompt tokens", "# no answer", "")  # fmt: skip
    print_table(columns, rows)


def _begin() -> Path:
    home = state_home()
    route_logs(home)
    return home


def _find(template: str, home: Path, task: TaskFile | None = None) -> PromptTemplate:
    """`task` is the template of the task at hand, where there is one."""
    from configs.load import load_template

    if template.startswith("prompts:/"):
        from actors.store.tracker import tracking_uri
        from pipelines.prompting.registration import fetch_prompt

        return fetch_prompt(template, tracking_uri(home))
    return load_template(template, task)
