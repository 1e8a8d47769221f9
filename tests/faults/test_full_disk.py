"""A full disk: a clear error, nothing half made, and the same command goes on once there is room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from actors.store.artifacts import ArtifactStore, verify_files

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB: room for a tokenizer and MLflow's database, not for the corpus."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def run(home: Path, recipe: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GANYMEDE_HOME": str(home), "MLFLOW_TRACKING_URI": ""}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "infra.cli.main", "run", str(recipe), "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_a_stage_that_finds_the_disk_full_fails_clearly_and_goes_on_later(small_disk: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(Path(__file__).with_name("recipe.yaml").read_text())
    document["stages"] = {name: document["stages"][name] for name in ("tokenizer", "corpus")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))
    home = small_disk / "home"

    failed = run(home, recipe)
    assert failed.returncode == 1, failed.stderr
    error = json.loads(failed.stdout)["error"]
    assert error["code"] == "storage_error"
    assert "No space left on device" in error["what"]
    assert "Traceback" not in failed.stderr
    store = ArtifactStore(home / "artifacts")
    assert [m.kind for m in store.list()] == ["tokenizer"]
    verify_files(store.get("tokenizer/tiny-tokenizer@1"))
    assert not any((home / "artifacts" / ".staging").glob("*"))

    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    done = run(home, recipe)
    assert done.returncode == 0, done.stderr
    assert [o["status"] for o in json.loads(done.stdout)["outcomes"]] == ["reused", "made"]
