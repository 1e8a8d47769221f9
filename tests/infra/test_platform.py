"""`up`, `submit`, `jobs` and `down` against a real Ray head and a real MLflow server on loopback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.store.artifacts import ArtifactStore
from infra.platform import free_ports, recorded_platform
from tests.infra.conftest import run_ganymede

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
RECIPE = """
name: sent
stages:
  tokenizer:
    source: {path: texts, include: ["*.txt"]}
    vocab_size: 300
    sample_bytes: 20000
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state folder of a platform that runs for all tests of this module, beside a recipe and its data."""
    folder = tmp_path_factory.mktemp("project")
    home = folder / ".ganymede"
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(f"The {number}th of forty texts. " * 20)
    dashboard, mlflow = map(str, free_ports(2))
    up = run_ganymede(home, "up", "--dashboard-port", dashboard, "--mlflow-port", mlflow, "--json")
    try:
        assert up.returncode == 0, up.stderr
        yield home
    finally:
        run_ganymede(home, "down")


def test_status_asks_every_service(home: Path) -> None:
    services = json.loads(run_ganymede(home, "status", "--json").stdout)["services"]
    assert [(s["name"], s["state"]) for s in services] == [("ray", "running"), ("mlflow", "running")]


def test_up_again_changes_nothing(home: Path) -> None:
    before = recorded_platform(home)
    assert run_ganymede(home, "up").returncode == 0
    assert recorded_platform(home) == before


def test_a_submitted_recipe_runs_to_the_end_and_its_log_is_followed(home: Path) -> None:
    done = run_ganymede(home, "submit", "recipe.yaml", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokenizer: made tokenizer/sent-tokenizer@1" in done.stdout
    assert [str(m.ref) for m in ArtifactStore(home / "artifacts").list()] == ["tokenizer/sent-tokenizer@1"]


@pytest.mark.slow
def test_the_exit_code_of_a_job_is_handed_on(home: Path) -> None:
    wrong = "stages.tokenizer.source.path=nowhere"
    done = run_ganymede(home, "submit", "recipe.yaml", "--set", wrong, "--set", "version=2", "--follow", "--json")
    assert done.returncode == 2, done.stderr
    job = json.loads(done.stdout)
    assert (job["status"], job["exit_code"]) == ("FAILED", 2)
    assert "nowhere" in done.stderr
    assert "nowhere" in run_ganymede(home, "jobs", "logs", job["id"]).stdout
    assert job["id"] in run_ganymede(home, "jobs", "list").stdout
    assert "had ended already" in run_ganymede(home, "jobs", "stop", job["id"]).stdout


def test_a_job_that_is_not_there_is_bad_input(home: Path) -> None:
    done = run_ganymede(home, "jobs", "logs", "raysubmit_none")
    assert done.returncode == 2
    assert "has no such job" in done.stderr


def test_a_recipe_outside_of_the_packed_folder_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text(RECIPE)
    done = run_ganymede(home, "submit", str(tmp_path / "far.yaml"))
    assert done.returncode == 2
    assert "outside of the working directory" in done.stderr


def test_down_leaves_no_process_behind(home: Path) -> None:
    platform = recorded_platform(home)
    assert platform is not None
    family = [c for p in platform.processes for c in psutil.Process(p.pid).children(recursive=True)]
    done = run_ganymede(home, "down", "--json")
    assert json.loads(done.stdout)["processes_ended"] >= len(platform.processes)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert recorded_platform(home) is None


def test_a_taken_port_is_bad_input_and_nothing_is_started(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done: subprocess.CompletedProcess[str] = run_ganymede(tmp_path / "home", "up", "--mlflow-port", port)
    assert done.returncode == 2
    assert f"--mlflow-port: 127.0.0.1:{port} cannot be listened on" in done.stderr
    assert recorded_platform(tmp_path / "home") is None
