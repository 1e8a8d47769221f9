"""One stage run by itself, for commands that take what they work on as options instead of a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.cli.models import find_model_folder
from infra.cli.output import err, say
from infra.cli.progress import RunProgress
from infra.cli.run import TRACKER_CLOSE_SECONDS

if TYPE_CHECKING:
    from actors.store.tracker import TrackerKind
    from pipelines.runner import Outcome


def model_reference(model: str, home: Path) -> tuple[str, str]:
    """What a report calls a model that was named on the command line, and what a stage's config is told."""
    found = find_model_folder(model, home)
    if found.ref is None:
        return label_of(found.folder.resolve().name), str(found.folder.resolve())
    return label_of(found.ref.partition("/")[2]), found.ref


def run_alone(project: str, name: str, stage: dict[str, Any], home: Path, tracker: TrackerKind) -> Outcome:
    """Runs one stage that publishes a report, as `report/PROJECT-NAME@N`: what it would make is reused where it stands,
    and otherwise gets a version that nothing stands under.

    Raises:
        ConfigError: the stage's values do not go together.
        GanymedeError: what the stage raises.
    """
    from pydantic import ValidationError

    from actors.store.artifacts import ArtifactStore
    from configs.errors import ConfigError
    from configs.schema.project import Recipe

    store = ArtifactStore(home / "artifacts")
    version = max(store.versions("report", f"{project}-{name}"), default=0) + 1
    try:
        recipe = Recipe.model_validate({"name": project, "version": version, "stages": {name: stage}})
    except ValidationError as error:
        raise ConfigError(f"the options do not go together: {error.errors()[0]['msg']}") from error
    with RunProgress(err()) as progress:
        from actors.store.tracker import open_tracker
        from infra.stages import STAGES
        from pipelines.runner import Runner

        tracking = open_tracker(tracker, home, recipe.name)
        try:
            return Runner(recipe, store, tracking, home, STAGES, progress).run().outcomes[0]
        finally:
            unsent = tracking.close(TRACKER_CLOSE_SECONDS)
            if unsent:
                say(f"{unsent} records wait on disk for the tracking server; the next run sends them")


def label_of(name: str) -> str:
    """A name as labels in reports may be."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:40] or "model"
