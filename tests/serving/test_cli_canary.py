"""A canary as it is typed: begun beside what runs, and ended by the version that takes over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.store.artifacts import ArtifactStore
from configs.artifacts import Identity, Ref
from infra.platform import free_ports
from tests.infra.conftest import run_ganymede
from tests.serving.conftest import make_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder with two versions of a model; what was started from it ends with the test."""
    home = tmp_path_factory.mktemp("project") / ".ganymede"
    store = ArtifactStore(home / "artifacts")
    for version in (1, 2):
        folder = make_model(tmp_path_factory.mktemp("model"), seed=version)
        store.publish(
            folder, ref=Ref("model", "tiny", version), identity=Identity("finetune", 1, {}, {}, {}), config={},
            inputs={}, summary={}, tracking_run=None, fence=lambda: None,
        )  # fmt: skip
    yield home
    run_ganymede(home, "down")


def test_a_canary_is_begun_and_takes_over_from_the_command_line(home: Path) -> None:
    port, dashboard, mlflow = map(str, free_ports(3))
    ports = ("--port", port, "--dashboard-port", dashboard, "--mlflow-port", mlflow, "--json")

    def up(*arguments: str) -> dict[str, Any]:
        done = run_ganymede(home, "up", *arguments, *ports)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/v1/models/tiny", timeout=30).json()
        return found

    both = up("--serve", "model/tiny@1", "--canary", "model/tiny@2", "--canary-weight", "0.3")
    assert (both["artifact"], both["canary"]["artifact"], both["canary"]["weight"]) == (
        "model/tiny@1", "model/tiny@2", 0.3,
    )  # fmt: skip
    services = json.loads(run_ganymede(home, "status", "--json").stdout)["services"]
    assert ("endpoint of model/tiny@1 with 30% for model/tiny@2", "running") in [
        (service["name"], service["state"]) for service in services
    ]
    refused = run_ganymede(home, "up", "--serve", "model/tiny@1", "--canary", "model/tiny@1", *ports)
    assert (refused.returncode, "another version of tiny" in refused.stdout + refused.stderr) == (2, True)
    taken = up("--serve", "model/tiny@2")
    assert taken["artifact"] == "model/tiny@2"
    assert "canary" not in taken
