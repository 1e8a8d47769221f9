"""`ganymede prompt`: templates, what a model gets of them, and what prompting is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from infra.cli.models import MODEL_HELP, find_model_folder
from infra.cli.output import Debug, Json, print_json, print_table, say
from infra.local import route_logs, state_home

if TYPE_CHECKING:
    from configs.schema.prompting import PromptTemplate

app = typer.Typer(
    help="Prompt templates: list, show, register; and what prompting is worth.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Template = Annotated[
    str,
    typer.Argument(
        metavar="TEMPLATE", help="A packaged template by name, a YAML file, or prompts:/NAME/VERSION of the registry."
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
    from pipelines.prompting.examples import Chooser, Pool, fit_prompt

    selection = ExampleSelection(strategy=strategy, seed=seed)
    read, asked = _find(template, home), load_task(task)
    items = load_items(asked)
    if item >= len(items):
        raise InputError("--item: the task has no such one", received=item, allowed=f"0 to {len(items) - 1}")
    examples = (
        Chooser(selection, Pool.of(load_items(asked, "train"), items)).choose(items[item], shots) if shots else ()
    )
    facts: dict[str, object] = {"template": read.name, "version": read.digest, "examples": len(examples)}
    if model is not None:
        from actors.engine.engine import Engine

        engine = Engine.load(find_model_folder(model, home).folder, max_sequences=1)
        room = engine.context_length - asked.answering.max_new_tokens
        fitted = fit_prompt(engine.text, read, items[item], examples, chat=chat, room=room)
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


def _begin() -> Path:
    home = state_home()
    route_logs(home)
    return home


def _find(template: str, home: Path) -> PromptTemplate:
    if template.startswith("prompts:/"):
        from actors.store.tracker import tracking_uri
        from pipelines.prompting.registration import fetch_prompt

        return fetch_prompt(template, tracking_uri(home))
    from configs.load import load_template

    return load_template(template)
