"""A sweep over tiny models, on a task of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from actors.engine.engine import Engine
from actors.store.artifacts import ArtifactStore
from configs.errors import ConfigError
from configs.load import load_task
from configs.schema.prompting import Drawing, ExampleSelection, PromptTemplate, SweepConfig
from pipelines.evaluation.items import load_items
from pipelines.prompting.cells import Way, ask_way
from pipelines.prompting.examples import Chooser, Pool
from pipelines.prompting.sweep_report import SweepReport
from pipelines.stage import Progress
from pipelines.stages.sweep import ANSWERS, SweepStage
from tests.actors.conftest import MakeModel
from tests.actors.engine.conftest import MakeEncoder
from tests.pipelines.evaluation.evaluation_world import classes_task, stage_context

ITEMS, TRAIN = 14, 20


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("task")
    (folder / "dev.tsv").write_text("".join(f"object {n}\t{n % 2}\n" for n in range(ITEMS)))
    (folder / "train.tsv").write_text("".join(f"string {n}\t{n % 2}\n" for n in range(TRAIN)))
    (folder / "odd.yaml").write_text(classes_task(folder, "{text} =", answering={"max_new_tokens": 8}))
    (folder / "other.yaml").write_text('{prompt: "{text} is", separator: "\\n", words: {"no": "even", "yes": "odd"}}')
    return str(folder / "odd.yaml")


@pytest.fixture
def config(task: str, make_model: MakeModel, make_encoder: MakeEncoder) -> SweepConfig:
    return SweepConfig(
        models={"tiny": str(make_model())},
        references={"encoder": str(make_encoder("bert", "ForSequenceClassification", labels=("no", "yes")))},
        task=task,
        templates=("task", str(Path(task).with_name("other.yaml"))),
        shots=(0, 2),
        sampling={"greedy": Drawing(), "warm": Drawing(temperature=0.7, seed=3)},
        max_sequences=4,
    )


def run(config: SweepConfig, folder: Path, progress: Any = None) -> tuple[dict[str, Any], SweepReport, Path]:
    context = stage_context(folder, ArtifactStore(folder / "store"), progress=progress)
    summary = SweepStage().run(config, {}, context)
    return summary, SweepReport.load(context.out), context.out


def test_every_way_is_asked_and_the_report_says_what_to_do(config: SweepConfig, tmp_path: Path) -> None:
    summary, report, out = run(config, tmp_path)
    assert [(c.template, c.sampling, c.shots) for c in report.cells] == [
        (template, sampling, shots)
        for template in ("task", "other")
        for sampling in ("greedy", "warm")
        for shots in (0, 2)
    ]
    assert report.items == ITEMS
    assert all(cell.unanswered == 0 and cell.shown == cell.shots for cell in report.cells)
    assert all(cell.score.low <= cell.score.value <= cell.score.high for cell in report.cells)
    assert summary["recommendation"]["sentences"][0].startswith("Best prompt: tiny, template")
    assert report.references["encoder"].against_best.first == report.cells[report.best].score.value
    answers = pq.read_table(out / ANSWERS).to_pylist()
    assert len(answers) == 8 * ITEMS
    assert {a["prediction"] for a in answers} <= {"no", "yes"}
    assert {a["text"] for a in answers if a["template"] == "other"} <= {" even", " odd"}
    (shown,) = {len(a["examples"]) for a in answers if a["shots"] == 2}
    assert shown == 2
    assert not any("object" in a["prompt"].rpartition("\n")[0] for a in answers)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_sweep_goes_on_and_ends_with_the_same_bytes(config: SweepConfig, tmp_path: Path) -> None:
    _, _, whole = run(config, tmp_path / "whole")

    def killed(progress: Progress) -> None:
        if progress.done >= 3 * ITEMS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "killed", killed)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "work").rglob("*.json")}
    assert len(kept) == 3
    _, _, out = run(config, tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())
    for name in ("report.json", "sweep.png", ANSWERS):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_examples_that_prompts_share_are_computed_once(task: str, make_model: MakeModel, tmp_path: Path) -> None:
    engine = Engine.load(make_model(), max_sequences=4)
    loaded = load_task(task)
    items = load_items(loaded)
    pool = Pool.of(load_items(loaded, "train"), items)
    chooser = Chooser(ExampleSelection(strategy="balanced"), pool)
    way = Way(PromptTemplate.of_task("task", loaded), 4, Drawing(), chat=False, held_to_choices=True)
    answers = ask_way(engine, loaded, items, way, chooser, tmp_path, lambda _: None)
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    new_tokens = sum(answer.tokens for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers)
    assert engine.tokens_run <= prompt_tokens + new_tokens - cached
    assert cached > 0.7 * prompt_tokens
    assert answers[0].cached_tokens == 0
    assert all(answer.cached_tokens > 0 for answer in answers[1:])


def test_answers_that_are_not_held_to_the_choices_may_be_none_of_them(
    task: str, make_model: MakeModel, tmp_path: Path
) -> None:
    engine, loaded = Engine.load(make_model(), max_sequences=4), load_task(task)
    way = Way(PromptTemplate.of_task("task", loaded), 0, Drawing(), chat=False, held_to_choices=False)
    answers = ask_way(engine, loaded, load_items(loaded), way, None, tmp_path, lambda _: None)
    assert {answer.prediction for answer in answers} - {"no", "yes"}
    assert all(answer.vectors["accuracy"][0] == 0 for answer in answers if answer.prediction == "")


def test_an_item_longer_than_the_window_counts_as_one_without_an_answer(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("object 1\t1\n" + "long " * 200 + "\t0\n")
    (tmp_path / "train.tsv").write_text("string 1\t1\n")
    (tmp_path / "odd.yaml").write_text(classes_task(tmp_path, "{text} =", answering={"max_new_tokens": 8}))
    model = {"tiny": str(make_model())}
    config = SweepConfig(models=model, task=str(tmp_path / "odd.yaml"), shots=(0, 1), max_sequences=4)
    _, report, out = run(config, tmp_path / "run")
    assert [cell.unanswered for cell in report.cells] == [1, 1]
    (asked, unasked) = [a for a in pq.read_table(out / ANSWERS).to_pylist() if a["shots"] == 0]
    assert asked["error"] is None
    assert "do not fit the model's window" in unasked["error"]


def test_a_model_that_cannot_be_prompted_is_refused(config: SweepConfig, tmp_path: Path) -> None:
    swapped = config.model_copy(update={"models": config.references, "references": {}})
    with pytest.raises(ConfigError, match=r"models\.encoder cannot be prompted"):
        run(swapped, tmp_path)


def test_what_decides_the_content_is_in_the_sources(config: SweepConfig, task: str) -> None:
    found = SweepStage().sources(config)
    assert set(found) == {"task", "templates.task", "templates.other", "models.tiny", "references.encoder"}
    other = Path(task).with_name("other.yaml")
    before = other.read_text()
    other.write_text(before.replace("is", "was"))
    changed = SweepStage().sources(config)
    other.write_text(before)
    assert {name for name in found if found[name] != changed[name]} == {"templates.other"}
