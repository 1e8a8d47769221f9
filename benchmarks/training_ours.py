"""A recipe through the runner, as `ganymede run` does it: Ray Train workers, MLflow, checkpoints and loader included.

Run as a process of its own; prints one JSON document with the figures of each training stage's reports, and what its
training took by its own clock: evaluation, start and end are left out, checkpoints are not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actors.store.artifacts import ArtifactStore
from actors.store.tracker import open_tracker
from configs.artifacts import Ref
from configs.load import load_recipe
from configs.schema.project import Recipe
from configs.schema.training import PretrainConfig
from infra.local import ray_session, route_logs, state_home

_CLOSE_SECONDS = 30.0


class _Reports:
    """An observer that keeps the figures of training stages."""

    def __init__(self) -> None:
        self.lines: dict[str, list[dict[str, float]]] = {}

    def stage_started(self, name: str, kind: str) -> None: ...

    def stage_finished(self, name: str, outcome: Any) -> None:
        print(f"{name}: {outcome.status}", file=sys.stderr)

    def stage_progress(self, name: str, progress: Any) -> None:
        if "tokens_per_second" in progress.figures:
            self.lines.setdefault(name, []).append({"step": progress.done, **progress.figures})


def _run(recipe: Recipe, home: Path) -> dict[str, list[dict[str, float]]]:
    """Models are made anew; what stands of the rest is reused."""
    store, reports = ArtifactStore(home / "artifacts"), _Reports()
    for stage, config in recipe.stages.items():
        name = f"{recipe.name}-{stage}"
        for number in store.versions("model", name) if isinstance(config, PretrainConfig) else ():
            store.remove(Ref("model", name, number))
    route_logs(home)
    with ray_session(home):
        # Ray reads how it is to authenticate when it is imported, which the session has prepared now.
        from infra.stages import STAGES
        from pipelines.runner import Runner

        tracker = open_tracker("mlflow", home, recipe.name)
        try:
            Runner(recipe, store, tracker, home, STAGES, reports).run()
        finally:
            tracker.close(_CLOSE_SECONDS)
    return reports.lines


def timed(lines: list[dict[str, float]], positions: int) -> list[dict[str, float]]:
    """`lines` with the `seconds` of training up to each, for steps of `positions`."""
    seconds, before, found = 0.0, 0.0, []
    for line in lines:
        seconds += (line["step"] - before) * positions / line["tokens_per_second"]
        before = line["step"]
        found.append({**line, "seconds": seconds})
    return found


def _save_rows(recipe: Recipe, stage: str, home: Path, steps: int) -> dict[str, str]:
    """The batches that `stage` sees, and its validation rows, as files for other programs."""
    from pipelines.stages.pretrain import open_split

    config = recipe.stages[stage]
    assert isinstance(config, PretrainConfig)
    corpus = ArtifactStore(home / "artifacts").get(f"corpus/{recipe.name}-{config.corpus}@{recipe.version}").path

    def rows(split: str) -> Any:
        return open_split(split, corpora={"": corpus}, config=config, row_tokens=config.model.context_length)

    train, files = rows("train"), {name: str(home / f"{name}.npy") for name in ("train", "validation")}
    np.save(files["train"], np.stack([train.batch(step) for step in range(steps)]).astype(np.int32))
    np.save(files["validation"], rows("validation").rows(config.training.eval_rows).astype(np.int32))
    return files


def _without_others(recipe: Recipe, only: str) -> Recipe:
    kept = {n: c for n, c in recipe.stages.items() if n == only or not isinstance(c, PretrainConfig)}
    return recipe.model_copy(update={"stages": kept})


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a packaged recipe or a YAML file")
    parser.add_argument("home", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", metavar="STAGE", help="of the stages that train, this one alone")
    parser.add_argument("--rows", metavar="STAGE", help="save the rows of this stage in the home folder")
    parser.add_argument("--row-steps", type=int, default=0, help="batches that are saved")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.set)
    if options.only:
        recipe = _without_others(recipe, options.only)
    os.environ["GANYMEDE_HOME"] = str(options.home)
    lines = _run(recipe, state_home())
    found: dict[str, Any] = {}
    for stage, reports in lines.items():
        config = recipe.stages[stage]
        assert isinstance(config, PretrainConfig)
        positions = config.training.batch_rows * config.model.context_length
        found[stage] = {"positions": positions, "lines": timed(reports, positions)}
    files = _save_rows(recipe, options.rows, options.home, options.row_steps) if options.rows else {}
    print(json.dumps({"stages": found, "files": files}))


if __name__ == "__main__":
    _main()
