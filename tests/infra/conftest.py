"""The `ganymede` command in a process of its own, with a state folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Ganymede = Callable[..., subprocess.CompletedProcess[str]]


def command_environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}}
    return {**kept, "GANYMEDE_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def run_ganymede(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    home.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "infra.cli.main", *arguments],
        cwd=home.parent,
        env=command_environment(home),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def ganymede(tmp_path: Path) -> Ganymede:
    return lambda *arguments: run_ganymede(tmp_path / "home", *arguments)
