"""`kill -9` of any process, in any stage: the same command goes on, and the artifacts are those of a run left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from actors.store.artifacts import ArtifactStore, verify_files

RECIPE = Path(__file__).with_name("recipe.yaml")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


class Command:
    """`ganymede run` on the tiny recipe, in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        environment = {**os.environ, "GANYMEDE_HOME": str(home), "MLFLOW_TRACKING_URI": ""}
        environment.pop("RAY_ADDRESS", None)
        self.log = (home.parent / f"{home.name}.log").open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "infra.cli.main", "run", str(RECIPE), "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Waits for a condition of the run; fails if the command ends before it."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"ended before the condition; see {self.log.name}"
            assert time.monotonic() < deadline, f"the condition did not come; see {self.log.name}"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9 of the driver; its Ray processes must follow within seconds."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, f"orphans: {[p.cmdline()[:3] for p in alive]}"

    def finish(self) -> dict[str, object]:
        """The JSON document of a run that must succeed."""
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, f"see {self.log.name}: {Path(self.log.name).read_text()[-3000:]}"
        document = json.loads(output)
        assert isinstance(document, dict)
        return document

    def children(self, name: str) -> Iterator[psutil.Process]:
        """Living descendants whose command line contains `name`."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    yield process
            except psutil.NoSuchProcess:
                continue

    def kill_child(self, name: str) -> None:
        """kill -9 of one descendant, once there is one."""
        self.until(lambda: any(self.children(name)))
        next(self.children(name)).send_signal(signal.SIGKILL)

    def in_stage(self, stage: str) -> Callable[[], bool]:
        return lambda: any((self.home / "leases").glob(f"*-tiny-{stage}@1/*.json"))

    def trained(self, stage: str, steps: int) -> Callable[[], bool]:
        """True once the stage has logged this step."""

        def reached() -> bool:
            for path in (self.home / "work").glob(f"model-tiny-{stage}-*/metrics.jsonl"):
                lines = path.read_text().splitlines()
                return any(json.loads(line)["step"] >= steps for line in lines[:-1])
            return False

        return reached


def digests(document: dict[str, object]) -> dict[str, str]:
    outcomes = document["outcomes"]
    assert isinstance(outcomes, list)
    return {o["stage"]: o["digest"] for o in outcomes}


def assert_whole(home: Path) -> None:
    """Whatever is published verifies, byte for byte."""
    store = ArtifactStore(home / "artifacts")
    for manifest in store.list():
        verify_files(store.get(manifest.ref))


def test_a_run_killed_in_every_stage_ends_with_the_artifacts_of_an_uninterrupted_one(tmp_path: Path) -> None:
    untouched = digests(Command(tmp_path / "untouched").finish())
    home = tmp_path / "killed"

    for stage in ("tokenizer", "corpus", "instructions"):
        run = Command(home)
        run.until(run.in_stage(stage))
        if stage == "corpus":
            run.until(lambda: any((home / "work").glob("corpus-tiny-corpus-*/*")))
        run.kill()
        assert_whole(home)

    run = Command(home)
    run.until(run.trained("pretrain", 10))
    run.kill_child("RayTrainWorker")  # replaced by Ray Train; the run goes on
    run.until(run.trained("pretrain", 40))
    run.kill()
    assert_whole(home)

    run = Command(home)
    run.until(run.trained("finetune", 15))
    run.kill_child("raylet/raylet")
    run.process.wait(timeout=120)
    assert run.process.returncode == 1
    message = Path(run.log.name).read_text()
    assert "Traceback" not in message
    assert_whole(home)

    for stage in ("evaluate", "register"):
        run = Command(home)
        run.until(run.in_stage(stage))
        run.kill()
        assert_whole(home)

    last = Command(home).finish()
    assert digests(last) == untouched
    assert not any((home / "artifacts" / ".staging").glob("*"))
