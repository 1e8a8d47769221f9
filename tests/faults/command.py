"""`ganymede run` as a process to be watched and killed."""

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

RECIPE = Path(__file__).with_name("recipe.yaml")


def heed_interrupts() -> None:
    """As a shell does for what it runs in the foreground; whoever runs the tests may have them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """`ganymede run` on a recipe (the tiny one unless told otherwise), in a process of its own."""

    def __init__(self, home: Path, recipe: Path = RECIPE, *, tracking_uri: str = "", terminal: bool = False) -> None:
        self.home = home
        environment = {**os.environ, "GANYMEDE_HOME": str(home), "MLFLOW_TRACKING_URI": tracking_uri}
        environment.pop("RAY_ADDRESS", None)
        self.log = (home.parent / f"{home.name}.log").open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "infra.cli.main", "run", str(recipe), "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=terminal,
            preexec_fn=heed_interrupts if terminal else None,
        )

    def until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Waits for a condition of the run; fails if the command ends before it."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"ended before the condition; see {self.log.name}"
            assert time.monotonic() < deadline, f"the condition did not come; see {self.log.name}"
            time.sleep(0.01)

    def interrupt(self) -> None:
        """Ctrl-C in the terminal of a command that has one: everything it started in the foreground gets it."""
        os.killpg(self.process.pid, signal.SIGINT)

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
