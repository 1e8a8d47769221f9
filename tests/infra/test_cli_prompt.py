"""`ganymede prompt` from outside, on a task of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.actors.conftest import MakeModel, make_model, tokenizer_folder
from tests.infra.conftest import Ganymede

__all__ = ["make_model", "tokenizer_folder"]

TASK = """
description: Is it good?
kind: classification
data:
  format: tsv
  columns: [text, label]
  evaluation: {folder}/dev.tsv
  train: {folder}/train.tsv
  get: written by the test
prompt: "Review: {{text}}\\nSentiment:"
choices: ["no", "yes"]
answer: "{{label}}"
answering: {{max_new_tokens: 4}}
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "dev.tsv").write_text("it dumps\t1\nit fails\t0\n")
    (tmp_path / "train.tsv").write_text("It  FAILS\t0\n" + "".join(f"object {n}\t{n % 2}\n" for n in range(12)))
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "mine.yaml").write_text('{instruction: Judge., prompt: "{text}?", words: {"yes": "good"}}')
    return str(tmp_path / "task.yaml")


def test_show_prints_the_prompt_that_fits_the_model(
    ganymede: Ganymede, task: str, tmp_path: Path, make_model: MakeModel
) -> None:
    arguments = ("prompt", "show", str(tmp_path / "mine.yaml"), "--task", task, "--shots", "12", "--strategy", "fixed")
    whole = json.loads(ganymede(*arguments, "--json").stdout)
    assert whole["prompt"].startswith("Judge.\n\nobject 0? no\n\nobject 1? good")
    assert whole["prompt"].endswith("it dumps?")
    assert (whole["examples"], whole["answer"]) == (12, ["yes"])
    fitted = json.loads(ganymede(*arguments, "--model", str(make_model()), "--json").stdout)
    assert 0 < fitted["examples"] < fitted["asked"] == 12
    assert fitted["tokens"] <= fitted["room"] == 96 - 4
    assert fitted["prompt"].endswith("object 11? good\n\nit dumps?")


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
