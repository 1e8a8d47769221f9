"""`ganymede prompt` from outside, on a task of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.actors.conftest import MakeModel, make_model, tokenizer_folder
from tests.infra.conftest import Ganymede
from tests.pipelines.evaluation.evaluation_world import classes_task

__all__ = ["make_model", "tokenizer_folder"]


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "dev.tsv").write_text("it dumps\t1\nit fails\t0\n")
    (tmp_path / "train.tsv").write_text("It  FAILS\t0\n" + "".join(f"object {n}\t{n % 2}\n" for n in range(12)))
    (tmp_path / "task.yaml").write_text(
        classes_task(tmp_path, "Review: {text}\nSentiment:", answering={"max_new_tokens": 4})
    )
    (tmp_path / "mine.yaml").write_text('{instruction: Judge., prompt: "{text}?", words: {"yes": "good"}}')
    return str(tmp_path / "task.yaml")


@pytest.mark.slow
def test_show_prints_the_prompt_that_fits_the_model(
    ganymede: Ganymede, task: str, tmp_path: Path, make_model: MakeModel
) -> None:
    arguments = ("prompt", "show", str(tmp_path / "mine.yaml"), "--task", task, "--shots", "12", "--strategy", "fixed")
    fitted = json.loads(ganymede(*arguments, "--model", str(make_model()), "--json").stdout)
    assert 0 < fitted["examples"] < fitted["asked"] == 12
    assert fitted["tokens"] <= fitted["room"] == 96 - len(" good") - 1
    assert fitted["prompt"].startswith("Judge.\n\nobject ")
    assert fitted["prompt"].endswith("object 11? good\n\nit dumps?")
    assert fitted["answer"] == ["yes"]


def test_show_prints_a_prompt_with_its_examples(ganymede: Ganymede, task: str, tmp_path: Path) -> None:
    template = str(tmp_path / "mine.yaml")
    shown = ganymede("prompt", "show", template, "--task", task, "--shots", "2", "--strategy", "fixed", "--item", "1")
    assert shown.stdout == "Judge.\n\nobject 0? no\n\nobject 1? good\n\nit fails?\n"
    chat = ganymede("prompt", "show", template, "--task", task, "--chat")
    assert chat.stdout == "user: Judge.\n\nit dumps?\n"


@pytest.mark.slow
def test_sweep_ends_with_a_recommendation_and_is_reused(
    ganymede: Ganymede, task: str, make_model: MakeModel, tmp_path: Path
) -> None:
    arguments = ("prompt", "sweep", str(make_model()), "--task", task, "--shots", "0,1", "--target", "1.5",
                 "--tracker", "none")  # fmt: skip
    made = ganymede(*arguments)
    assert made.returncode == 0, made.stderr
    assert "Best prompt: model" in made.stdout
    assert made.stdout.rstrip().endswith("points below the target (150.0): fine-tune.")
    again = json.loads(ganymede(*arguments, "--json").stdout)
    assert again["status"] == "reused"
    assert again["recommendation"]["advice"] == "fine-tune"
    assert (Path(again["folder"]) / "sweep.png").is_file()


@pytest.mark.slow
def test_a_template_is_registered_once_and_found_again(ganymede: Ganymede, task: str, tmp_path: Path) -> None:
    first = json.loads(ganymede("prompt", "register", str(tmp_path / "mine.yaml"), "--json").stdout)
    assert (first["uri"], first["new"]) == ("prompts:/mine/1", True)
    again = json.loads(ganymede("prompt", "register", str(tmp_path / "mine.yaml"), "--json").stdout)
    assert again == {**first, "new": False}
    (tmp_path / "mine.yaml").write_text('{prompt: "{text}!"}')
    assert ganymede("prompt", "register", str(tmp_path / "mine.yaml")).stdout.strip() == "prompts:/mine/2"
    shown = ganymede("prompt", "show", "prompts:/mine/1", "--task", task).stdout
    assert shown.strip() == "Judge.\n\nit dumps?"
