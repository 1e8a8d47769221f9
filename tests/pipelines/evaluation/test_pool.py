"""Several copies of a model in Ray actors: the same report as one, also through `kill -9`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from evaluation_world import World, stage_context
from test_tasks_stage import run, tasks

from configs.errors import ArtifactError, ConfigError
from configs.schema.evaluation import TasksConfig
from pipelines.evaluation import asking
from pipelines.evaluation.pool import Pool
from pipelines.evaluation.stored_report import REPORT
from pipelines.evaluation.task_report import ANSWERS, PAGE
from pipelines.stage import Progress
from pipelines.stages.tasks import TasksStage

__all__ = ["tasks"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]  # 35 s: Ray, and a model loaded four times


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "GROUP", 2)


def copies() -> list[int]:
    """Process ids of the copies that live."""
    return [p.pid for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::_Copy")]


def none_is_left() -> bool:
    deadline = time.monotonic() + 10
    while copies() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not copies()


@pytest.mark.usefixtures("small_groups")
def test_two_copies_one_of_them_killed_give_the_report_of_one(world: World, tasks, tmp_path: Path) -> None:
    config = TasksConfig(models={"m": "x"}, tasks=(tasks["classes"], tasks["writing"]), shots=2)
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.done and not killed:
            killed.append(copies()[0])
            os.kill(killed[0], signal.SIGKILL)

    alone = run(world, tmp_path / "one", config)
    pooled = run(world, tmp_path / "two", config.model_copy(update={"replicas": 2}), progress=kill)
    assert killed
    for name in (REPORT, PAGE, ANSWERS):
        assert (pooled / name).read_bytes() == (alone / name).read_bytes()
    assert none_is_left()


def test_a_model_that_cannot_do_the_task_is_refused_as_by_one_copy(world: World, tasks, tmp_path: Path) -> None:
    config = TasksConfig(models={"m": "x"}, tasks=(tasks["reading"],), replicas=2, chat=True)
    with pytest.raises(ConfigError, match="not of conversations"):
        TasksStage().run(config, {"models.m": world.inputs["models.finetuned"]}, stage_context(tmp_path, world.store))
    assert none_is_left()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with Pool(tmp_path, replicas=1, max_sequences=4, chat=False) as pool, pytest.raises(ArtifactError):
        pool.facts()
