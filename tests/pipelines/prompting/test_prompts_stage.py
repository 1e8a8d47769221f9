"""A task's training split becomes a dataset for a decoder, without what is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.store.artifacts import ArtifactStore
from configs.errors import ConfigError, DataError
from configs.load import load_task
from configs.schema.prompting import PromptsConfig
from pipelines.evaluation.items import load_items
from pipelines.evaluation.lineage import check_items
from pipelines.stages.prompts import PromptsStage
from tests.pipelines.evaluation.evaluation_world import classes_task, publish, stage_context

TEMPLATE = '{instruction: Judge., prompt: "{text}?", words: {"yes": "good"}}'


def write_task(folder: Path) -> str:
    folder.mkdir()
    (folder / "dev.tsv").write_text("it dumps\t1\nit fails\t0\n")
    (folder / "train.tsv").write_text("It  FAILS\t0\n" + "".join(f"object {n}\t{n % 2}\n" for n in range(40)))
    (folder / "task.yaml").write_text(classes_task(folder, "Review: {text}\nSentiment:"))
    (folder / "mine.yaml").write_text(TEMPLATE)
    return str(folder / "task.yaml")


def make(config: PromptsConfig, folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], Path]:
    context = stage_context(folder, ArtifactStore(folder / "store"))
    report = PromptsStage().run(config, {}, context)
    names = ("train", "heldout")
    lines = {name: (context.out / f"{name}.jsonl").read_text().splitlines() for name in names}
    return report, {name: [json.loads(line) for line in lines[name]] for name in names}, context.out


def test_prompts_hold_the_training_split_and_nothing_that_is_scored(tmp_path: Path) -> None:
    task = write_task(tmp_path / "a")
    report, found, out = make(PromptsConfig(task=task, split={"validation_fraction": 0.2}), tmp_path / "made")
    assert report["left_out"] == 1
    assert report["prompts"] == {name: len(lines) for name, lines in found.items()}
    both = found["train"] + found["heldout"]
    assert len(both) == len({line["id"] for line in both}) == 40
    assert not any("fails" in line["prompt"].casefold() for line in both)
    one = next(line for line in both if line["text"] == "object 3")
    assert (one["prompt"], one["completion"]) == ("Review: object 3\nSentiment:", " yes")

    dataset = publish(ArtifactStore(tmp_path / "store"), "dataset", "prompts", out, {})
    store = ArtifactStore(tmp_path / "store")
    asked = load_task(task)
    assert check_items("tuned", dataset, store, "task", load_items(asked)) == {"dataset/prompts@1": "clean"}
    with pytest.raises(DataError, match=r"tuned may not be scored on task: it learned from dataset/prompts@1"):
        check_items("tuned", dataset, store, "task", load_items(asked, "train"))


def test_a_template_makes_texts_or_conversations(tmp_path: Path) -> None:
    task = write_task(tmp_path / "a")
    asked = {"task": task, "template": str(tmp_path / "a" / "mine.yaml"), "split": {"validation_fraction": 0.2}}
    plain = {line["text"]: line for lines in make(PromptsConfig(**asked), tmp_path / "p")[1].values() for line in lines}
    assert (plain["object 1"]["prompt"], plain["object 1"]["completion"]) == ("Judge.\n\nobject 1?", " good")
    made = make(PromptsConfig(**asked, chat=True), tmp_path / "c")[1]
    chats = {line["text"]: line for lines in made.values() for line in lines}
    assert plain.keys() == chats.keys()
    assert chats["object 1"]["messages"] == [
        {"role": "user", "content": "Judge.\n\nobject 1?"},
        {"role": "assistant", "content": "good"},
    ]


def test_sources_are_the_content_and_not_the_place(tmp_path: Path) -> None:
    stage = PromptsStage()
    places = [write_task(tmp_path / name) for name in ("a", "b", "c")]
    (tmp_path / "c" / "train.tsv").write_text("something else\t0\n")
    first, same, other = (stage.sources(PromptsConfig(task=place)) for place in places)
    assert first == same != other
    assert stage.sources(PromptsConfig(task=places[0], template=str(tmp_path / "a" / "mine.yaml"))) != first


def test_a_task_without_answers_is_refused(tmp_path: Path) -> None:
    task = Path(write_task(tmp_path / "a"))
    asked = yaml.safe_load(task.read_text())
    kept = {key: asked[key] for key in ("description", "data", "prompt")}
    task.write_text(yaml.safe_dump({**kept, "kind": "language_modelling"}))
    with pytest.raises(ConfigError, match="no answers to learn"):
        make(PromptsConfig(task=str(task)), tmp_path / "made")


def test_a_split_without_a_prompt_is_refused(tmp_path: Path) -> None:
    task = write_task(tmp_path / "a")
    with pytest.raises(DataError, match=r"heldout\.jsonl would hold no prompt"):
        make(PromptsConfig(task=task, split={"validation_fraction": 1e-9}), tmp_path / "made")
