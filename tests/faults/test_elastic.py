"""Machines that leave a cluster and come to it while a model is trained on `(min, max)` workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from infra.local import LOCAL_RAY
from tests.faults.command import RECIPE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, ROWS = 100_000, 48
CLUSTER = {name: value for name, value in os.environ.items() if name not in LOCAL_RAY} | {
    "RAY_AUTH_MODE": "disabled",
    # A group that was to hold a lost machine, before Ray knew, is given up after this; the default is 60 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
"""Environment of a Ray of several machines, without the settings of one that keeps to this one."""


def free_port() -> int:
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def wait_for(address: str) -> None:
    """Returns when somebody answers there."""
    host, _, port = address.partition(":")
    deadline = time.monotonic() + 60
    while True:
        with closing(socket.socket()) as asking:
            if asking.connect_ex((host, int(port))) == 0:
                return
        assert time.monotonic() < deadline, f"no Ray head at {address}"
        time.sleep(0.2)


class Machine:
    """A Ray node of one processor; the one numbered 1 is the head, which the driver connects to by its address."""

    def __init__(self, folder: Path, address: str, number: int) -> None:
        place = [f"--node-ip-address=127.0.0.{number}"]
        if number == 1:
            place += ["--head", f"--port={address.partition(':')[2]}"]
            place += ["--include-dashboard=false", f"--temp-dir={folder}"]
        else:
            place += [f"--address={address}"]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", *place, "--num-cpus=1", "--block",
             "--disable-usage-stats", f"--object-store-memory={100 << 20}"],
            env=CLUSTER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def lose(self) -> None:
        """kill -9 of the node and all that runs on it."""
        family = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family[1:], timeout=20)
        self.process.wait()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Callable[[], Machine], str]]:
    """A head of one processor, its address, and what adds a machine to it."""
    folder = tmp_path_factory.mktemp("r")
    address = f"127.0.0.1:{free_port()}"
    machines = [Machine(folder, address, 1)]
    wait_for(address)

    def add() -> Machine:
        machines.append(Machine(folder, address, len(machines) + 1))
        return machines[-1]

    try:
        yield add, address
    finally:
        for machine in reversed(machines):
            if machine.process.poll() is None:
                machine.lose()


def recipe(folder: Path, workers: Any) -> Path:
    """The tiny recipe up to pretraining, which goes on until it is ended."""
    document = yaml.safe_load(RECIPE.read_text())
    stages = document["stages"]
    document["stages"] = {name: stages[name] for name in ("tokenizer", "corpus", "pretrain")}
    stages["pretrain"]["training"] |= {
        "steps": STEPS, "batch_rows": ROWS, "micro_batch_rows": 2, "log_every_steps": 1, "workers": workers,
        "eval_every_steps": STEPS,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def lines(home: Path) -> list[dict[str, Any]]:
    """What training has reported so far."""
    paths = list((home / "work").glob("model-tiny-pretrain-*/metrics.jsonl"))
    text = paths[0].read_text() if paths else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def test_a_machine_that_is_lost_is_done_without_and_one_that_comes_is_taken_in(
    tmp_path: Path, cluster: tuple[Callable[[], Machine], str]
) -> None:
    add, address = cluster
    second = add()
    home = tmp_path / "home"
    log = (tmp_path / "log").open("w")
    run = subprocess.Popen(
        [sys.executable, "-m", "infra.cli.main", "run", str(recipe(tmp_path, [1, 2])), "--json"],
        env={**CLUSTER, "GANYMEDE_HOME": str(home), "RAY_ADDRESS": address, "MLFLOW_TRACKING_URI": ""},
        stdout=log, stderr=log,
    )  # fmt: skip

    def until(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not happened():
            assert run.poll() is None, Path(log.name).read_text()[-3000:]
            assert time.monotonic() < deadline, f"the condition did not come; see {log.name}"
            time.sleep(0.1)

    def workers() -> list[str]:
        return [line["notice"] for line in lines(home) if line.get("notice", "").startswith("workers: ")]

    def steps() -> int:
        return max((line["step"] for line in lines(home) if "step" in line), default=0)

    try:
        until(lambda: steps() >= 10)
        assert workers() == ["workers: 2 from step 1 on"]
        second.lose()
        until(lambda: len(workers()) == 2)
        assert workers()[1].startswith("workers: 1 from step ")
        gone_on = steps() + 10
        until(lambda: steps() >= gone_on)
        add()
        until(lambda: len(workers()) == 3)
        assert workers()[2].startswith("workers: 2 from step ")
        gone_on = steps() + 10
        until(lambda: steps() >= gone_on)
        told = [line for line in lines(home) if "step" in line]
        run.terminate()
        assert run.wait(60) == 130
    finally:
        run.kill()
    assert [line["step"] for line in told] == list(range(1, len(told) + 1))
    assert [line["tokens_seen"] for line in told] == [ROWS * 128 * step for step in range(1, len(told) + 1)]
