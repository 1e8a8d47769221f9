"""`ganymede promote` and `ganymede rollback` as they are typed, over models that were really evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from actors.store.artifacts import ArtifactStore
from actors.store.mlflow_runs import open_client
from actors.store.registry import Registry
from actors.store.tracker import tracking_uri
from configs.artifacts import Identity, Ref
from infra.cli.main import app
from tests.actors.conftest import MakeModel, make_model, tokenizer_folder

__all__ = ["make_model", "tokenizer_folder"]
Typed = Callable[..., Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project") / "home"


@pytest.fixture
def typed(home: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setenv("GANYMEDE_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def registry(home: Path, make_model: MakeModel) -> Registry:
    """Two versions of a model, the first one champion; every test leaves it so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry.open(tracking_uri(home))
    for version, spread in ((1, 0.2), (2, 0.3)):
        shutil.copytree(make_model(initializer_range=spread), home.parent / str(version))
        artifact = ArtifactStore(home / "artifacts").publish(
            home.parent / str(version), ref=Ref("model", "tiny", version), identity=Identity("finetune", 1, {}, {}, {}),
            config={}, inputs={}, summary={}, tracking_run=None, fence=lambda: None,
        )  # fmt: skip
        registry.register("tiny", ref=str(artifact.ref), digest=artifact.digest, run_id=None, tags={})
    registry.set_alias("tiny", "champion", 1)
    return registry


def write_task(path: Path, right: list[int]) -> str:
    """Which of two words follows, and which one is right."""
    lines = [{"text": f"def f{n}(", "a": f"x{n * 7}", "b": f"y{n * 3}):", "right": r} for n, r in enumerate(right)]
    items = path.with_suffix(".jsonl")
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"format": "jsonl", "evaluation": str(items), "get": "it from example.org"}
    content = {"description": "d", "kind": "multiple_choice", "choices": ["{a}", "{b}"], "label": "right", "data": data}
    path.write_text(yaml.safe_dump(content))
    return str(path)


def evaluate(typed: Typed, model: str, task: str, tracker: str = "none") -> dict[str, Any]:
    done = typed("evaluate", model, "--task", task, "--tracker", tracker, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def champion(registry: Registry) -> int:
    return registry.resolve("tiny@champion").version


def test_an_alias_moves_to_a_model_that_is_better_and_back_again(
    typed: Typed, registry: Registry, home: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    asked = evaluate(typed, str(make_model(initializer_range=0.3)), write_task(tmp_path / "draft.yaml", [0] * 40))
    answers = pq.read_table(Path(asked["folder"]) / "answers.parquet", columns=["prompt", "prediction"]).to_pylist()
    chosen = {row["prompt"]: int(row["prediction"].startswith("y")) for row in answers}
    task = write_task(tmp_path / "words.yaml", [chosen[f"def f{n}("] for n in range(40)])

    unjudged = typed("promote", "tiny@2")
    assert (unjudged.exit_code, "ganymede evaluate tiny@1 --task" in unjudged.output) == (2, True)
    evaluate(typed, "tiny@1", task)
    unasked = typed("promote", "tiny@2")
    assert (unasked.exit_code, "ganymede evaluate tiny@2 --task words" in unasked.output) == (2, True)
    judged = evaluate(typed, "tiny@2", task, tracker="mlflow")
    assert judged["registered"] == ["tiny@2"]
    [model] = judged["models"].values()
    accuracy = model["tasks"]["words"]["scores"]["acc"]
    card = open_client(tracking_uri(home)).get_model_version("tiny", "2").description
    interval = f"{accuracy['value']:g} ({accuracy['low']:g} to {accuracy['high']:g})"
    assert f"| words.acc | {interval}, {judged['report']} |" in card

    tried = typed("promote", "tiny@2", "--dry-run")
    assert (tried.exit_code, champion(registry)) == (0, 1)
    refused = typed("promote", "tiny@2", "--min-gain", "words.acc=1.1", "--json")
    assert (refused.exit_code, champion(registry)) == (1, 1)
    assert json.loads(refused.stdout)["moved"] is False
    assert any("of at least +1.1: fails" in reason for reason in json.loads(refused.stdout)["reasons"])

    moved = typed("promote", "tiny", "--min-score", "acc=0.99")
    assert (moved.exit_code, champion(registry)) == (0, 2)
    assert "tiny@champion is tiny@2 now; it was tiny@1" in moved.output
    assert "is champion already" in typed("promote", "tiny@2").output
    worse = typed("promote", "tiny@1")
    assert (worse.exit_code, champion(registry)) == (1, 2)
    assert "guard, worse: fails" in worse.output

    back = typed("rollback", "tiny")
    assert (back.exit_code, champion(registry)) == (0, 1)
    assert "tiny@champion is tiny@1 (model/tiny@1) again; it was tiny@2" in back.output
    again = typed("rollback", "tiny")
    assert (again.exit_code, champion(registry)) == (2, 1)


def test_an_alias_that_nobody_has_is_given_without_a_rival(typed: Typed, registry: Registry) -> None:
    assert typed("promote", "tiny@1", "--to", "stable", "--min-score", "acc=1.01").exit_code == 1
    assert typed("promote", "tiny@1", "--to", "stable").exit_code == 0
    assert registry.resolve("tiny@stable").version == 1


@pytest.mark.parametrize("arguments", [("--to", "7"), ("--min-gain", "acc"), ("--min-score", "acc=good")])
def test_an_option_that_cannot_be_read_is_bad_input(
    typed: Typed, registry: Registry, arguments: tuple[str, ...]
) -> None:
    assert typed("promote", "tiny@2", *arguments).exit_code == 2
    assert champion(registry) == 1
