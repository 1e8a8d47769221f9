"""`ganymede evaluate` and `ganymede compare` as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from configs.load import packaged_tasks
from infra.cli.main import app
from tests.actors.conftest import MakeModel, make_model, tokenizer_folder

__all__ = ["make_model", "tokenizer_folder"]
Typed = Callable[..., Any]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setenv("GANYMEDE_HOME", str(tmp_path / "home"))
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def task(tmp_path: Path) -> str:
    lines = [{"text": f"def f{n}(", "right": n % 2} for n in range(6)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"format": "jsonl", "evaluation": str(tmp_path / "items.jsonl"), "get": "it from example.org"}
    content = {"description": "d", "kind": "multiple_choice", "choices": ["x):", "y"], "label": "right", "data": data}
    (tmp_path / "signs.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "signs.yaml")


def test_a_model_is_scored_once_and_a_second_model_is_held_against_it(
    typed: Typed, make_model: MakeModel, task: str
) -> None:
    model = str(make_model())
    first = typed("evaluate", model, "--task", task, "--tracker", "jsonl", "--json")
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert report["status"] == "made"
    assert report["tasks"]["signs"]["asked"] == 6
    assert {path.name for path in Path(report["folder"]).iterdir()} >= {
        "report.json", "report.html", "scores.png", "answers.parquet",
    }  # fmt: skip
    again = typed("evaluate", model, "--task", task, "--tracker", "jsonl", "--json")
    assert (json.loads(again.stdout)["status"], json.loads(again.stdout)["report"]) == ("reused", report["report"])
    limited = typed("evaluate", model, "--task", task, "--limit", "4", "--tracker", "none")
    assert "acc_norm" in limited.stdout
    same = typed("compare", report["report"], report["report"])
    assert same.stdout.count("noise") == 3
    other = report["report"].replace("@1", "@2")
    assert "other asked" in typed("compare", report["report"], other).output


def test_the_help_names_every_packaged_task(typed: Typed) -> None:
    shown = typed("evaluate", "--help").output
    assert [name for name in packaged_tasks() if name not in shown] == []


def test_absent_data_and_an_unknown_task_are_one_message(typed: Typed, make_model: MakeModel, task: str) -> None:
    model = str(make_model())
    done = typed("evaluate", model, "--task", "sst", "--tracker", "none")
    assert (done.exit_code, "did you mean sst2?" in done.output) == (2, True)
    Path(task).with_name("items.jsonl").unlink()
    done = typed("evaluate", model, "--task", task, "--tracker", "none")
    assert (done.exit_code, "next: get it from example.org" in done.output) == (2, True)


def test_a_judge_that_does_not_answer_is_one_message(
    typed: Typed, make_model: MakeModel, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluation.endpoints._FIRST_PAUSE_SECONDS", 0.01)
    report = json.loads(typed("evaluate", str(make_model()), "--task", task, "--tracker", "none", "--json").stdout)
    nobody = ("--by", "j", "--endpoint", "http://127.0.0.1:9/v1", "--tracker", "none")
    done = typed("judge", report["report"], report["report"], "--task", "signs", *nobody)
    assert done.exit_code == 1
    assert "http://127.0.0.1:9/v1/models gave no answer" in done.output
