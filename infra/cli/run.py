"""`ganymede run`: a recipe from wherever it stands to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.output import Debug, Json, Tracker, err, print_json, say
from infra.cli.progress import RunProgress
from infra.local import ray_session, route_logs, state_home

if TYPE_CHECKING:
    from configs.schema.project import Recipe

TRACKER_CLOSE_SECONDS = 30.0
"""Longest that a finished run waits for the tracking server to take what is left."""


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe (demo) or a YAML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value: stages.pretrain.training.steps=100."),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run this stage alone; its inputs stand.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Leave out the stages before this one; they stand.")
    ] = None,
    tracker: Tracker = "mlflow",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Runs a recipe. Stages that stand are reused, interrupted ones go on. Example: ganymede run demo."""
    from configs.load import load_recipe

    resolved = load_recipe(recipe, set_ or ())
    for option, stage in (("--only", only), ("--from", start)):
        _require_stage(resolved, option, stage)
    home = state_home()
    log = route_logs(home)
    progress = RunProgress(err())
    progress.say(f"{resolved.name}: {len(resolved.stages)} stages, state in {home}, log in {log}")
    with ray_session(home) as cluster, progress:
        from actors.store.artifacts import ArtifactStore
        from actors.store.tracker import open_tracker
        from infra.stages import STAGES
        from pipelines.runner import Runner

        progress.say(f"Ray: {'embedded' if cluster.embedded else cluster.address}")
        tracking = open_tracker(tracker, home, resolved.name)
        try:
            store = ArtifactStore(home / "artifacts")
            report = Runner(resolved, store, tracking, home, STAGES, progress).run(only=only, start=start)
        finally:
            unsent = tracking.close(TRACKER_CLOSE_SECONDS)
            if unsent:
                say(f"{unsent} records wait on disk for the tracking server; the next run sends them")
    if as_json:
        print_json(report.to_json())
    else:
        from infra.cli.summary import print_summary

        print_summary(report)


def _require_stage(recipe: Recipe, option: str, stage: str | None) -> None:
    """Raises `ConfigError` before anything is started."""
    from configs.errors import ConfigError
    from configs.load import suggestion

    if stage is not None and stage not in recipe.stages:
        raise ConfigError(
            f"{option}: {recipe.name} has no such stage{suggestion(stage, recipe.stages)}",
            received=stage,
            allowed=", ".join(recipe.order()),
        )
