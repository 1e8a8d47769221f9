"""What the tests of evaluation share: see `evaluation_world`."""

from __future__ import annotations

import pytest
from evaluation_world import CONFIG, World, make_world, stage_context

from actors.store.artifacts import Artifact
from pipelines.stages.evaluate import EvaluateStage


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def evaluated(world: World, tmp_path_factory) -> Artifact:
    """The published report of both models."""
    context = stage_context(tmp_path_factory.mktemp("evaluated"), world.store)
    EvaluateStage().run(CONFIG, world.inputs, context)
    return world.publish("report", "demo-evaluate", context.out, world.inputs, "run-evaluate")
