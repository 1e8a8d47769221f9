"""The stage `tasks` from the outside: reports, what is kept, what is refused, endpoints, and comparing two reports."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_world import PAIRS, TEXTS, TRAINED_ON, World, endpoint, publish, stage_context

from actors.engine.engine import Engine
from actors.engine.request import Request
from configs.errors import ConfigError, DataError
from configs.schema.evaluation import TasksConfig
from configs.schema.generation import Sampling
from pipelines.evaluation import endpoints
from pipelines.evaluation.asking import read_rows
from pipelines.evaluation.comparing import compare_reports
from pipelines.evaluation.local_models import LocalModel, windows
from pipelines.evaluation.stored_report import REPORT
from pipelines.evaluation.task_report import ANSWERS, PAGE, TasksReport
from pipelines.stage import Progress
from pipelines.stages.tasks import TasksStage

LINES = [{"text": f"def add_{n}(a, b):", "kind": n % 2, "train": n >= 8} for n in range(12)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, str]:
    """Paths of task files by kind."""
    folder = tmp_path_factory.mktemp("tasks")
    for split in (False, True):
        lines = [json.dumps(line) + "\n" for line in LINES if line["train"] is split]
        (folder / f"{'train' if split else 'scored'}.jsonl").write_text("".join(lines))
    sources = {"evaluation": str(folder / "scored.jsonl"), "train": str(folder / "train.jsonl")}
    data = {"format": "jsonl", **sources, "get": "it here"}
    made: dict[str, dict[str, Any]] = {
        "reading": {"kind": "language_modelling"},
        "classes": {"kind": "classification", "choices": ["even", "odd"], "label": "kind", "instruction": "Which?"},
        "writing": {
            "kind": "generation", "answer": "{kind}", "metrics": ["exact_match", "chrf"],
            "answering": {"max_new_tokens": 4, "stop": ["\n"]},
        },
        "programs": {
            "kind": "code", "answer": "{kind}", "metrics": ["pass@1"],
            "program": {"template": "if {kind}: raise ValueError"},
            "answering": {"max_new_tokens": 2, "samples": 2, "temperature": 1.0},
        },
    }  # fmt: skip
    for name, task in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"description": name, "data": data, **task}))
    return {name: str(folder / f"{name}.yaml") for name in made}


def run(
    world: World,
    folder: Path,
    config: TasksConfig,
    model: str = "finetuned",
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    context = stage_context(folder, world.store, progress=progress)
    inputs = {f"models.{label}": world.inputs[f"models.{model}"] for label in config.models if label != "folder"}
    TasksStage().run(config, inputs, context)
    return context.out


@pytest.fixture(scope="module")
def reported(world: World, tasks, tmp_path_factory) -> Path:
    config = TasksConfig(models={"m": "x"}, tasks=tuple(tasks.values()), shots=2)
    return run(world, tmp_path_factory.mktemp("reported"), config)


def test_every_kind_is_scored_with_intervals_and_how_each_score_is_made(reported: Path) -> None:
    report = TasksReport.load(reported)
    assert list(report.tasks) == ["reading", "classes", "writing", "programs"]
    for name, facts in report.tasks.items():
        found = report.models["m"].tasks[name]
        assert list(found.scores) == list(facts.metrics)
        assert all(score.low <= score.value <= score.high for score in found.scores.values())
        assert (facts.asked, found.failed) == (8, 0)
    assert report.tasks["writing"].metrics["chrf"].startswith("chrF2|nrefs:1|")
    assert report.models["m"].facts["dtype"] in ("float32", "bfloat16")
    # Half of the programs raise, whatever the model wrote.
    assert report.models["m"].tasks["programs"].scores["pass@1"].value == 0.5
    assert len(read_rows(reported / ANSWERS, model="m", task="programs")[0].programs) == 2


def test_prompts_hold_the_instruction_and_examples_of_the_training_split(reported: Path) -> None:
    rows = read_rows(reported / ANSWERS, model="m", task="classes")
    heads = {row.prompt.rpartition("\n\n")[0] for row in rows}
    (head,) = heads  # what comes before the item is the same for all, so that it is computed once
    assert head.startswith("Which?\n\ndef add_")
    assert head.count("\n\n") == 2
    assert all(f"add_{n}(" not in head for n in range(8))
    assert rows[0].references == ("even",)
    assert len(rows[0].response.logprobs) == 2


def test_equal_runs_give_equal_reports(world: World, tasks, tmp_path: Path) -> None:
    config = TasksConfig(models={"m": "x"}, tasks=(tasks["classes"], tasks["writing"]), shots=2)
    first, again = run(world, tmp_path / "a", config), run(world, tmp_path / "b", config)
    for name in (REPORT, PAGE):
        assert (again / name).read_bytes() == (first / name).read_bytes()


def test_the_page_needs_nothing_else_and_data_cannot_leave_its_place(world: World, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "</script><script>alert(1)</script>", "a": "x"}) + "\n")
    data = {"format": "jsonl", "evaluation": str(tmp_path / "a.jsonl"), "get": "it"}
    task = {"description": "d", "kind": "generation", "answer": "{a}", "metrics": ["exact_match"], "data": data}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task))
    out = run(world, tmp_path / "run", TasksConfig(models={"m": "x"}, tasks=(f"{tmp_path}/t.yaml",)))
    page = (out / PAGE).read_text()
    assert page.count("</script>") == 2
    assert "http" not in page
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["items"][0]["prompt"] == "</script><script>alert(1)</script>"


def test_a_run_that_ended_early_asks_only_what_is_missing(
    world: World, tasks, reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluation.asking.GROUP", 3)
    config = TasksConfig(models={"m": "x"}, tasks=(tasks["reading"],))
    asked: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path, config, progress=stop)
    original = LocalModel.documents

    def counted(self: LocalModel, texts: Any, stride: Any) -> Any:
        asked.append(len(texts))
        return original(self, texts, stride)

    monkeypatch.setattr(LocalModel, "documents", counted)
    out = run(world, tmp_path, config)
    assert asked == [2]
    found, whole = TasksReport.load(out), TasksReport.load(reported)
    assert found.models["m"].tasks["reading"].scores == whole.models["m"].tasks["reading"].scores


def test_the_limit_takes_the_same_items_every_time(world: World, tasks, tmp_path: Path) -> None:
    config = TasksConfig(models={"m": "x"}, tasks=(tasks["reading"],), limit=3)
    first = read_rows(run(world, tmp_path / "a", config) / ANSWERS)
    second = read_rows(run(world, tmp_path / "b", config.model_copy(update={"limit": 5})) / ANSWERS)
    assert len(first) == 3
    assert {row.item for row in first} < {row.item for row in second}


def test_speed_and_cost_stand_beside_the_scores_and_not_in_the_report(world: World, tasks, tmp_path: Path) -> None:
    config = TasksConfig(models={"m": "x"}, tasks=(tasks["writing"],), limit=3, price_per_hour=36.0)
    context = stage_context(tmp_path, world.store)
    summary = TasksStage().run(config, {"models.m": world.inputs["models.finetuned"]}, context)
    speed = summary["speed"]["m/writing"]
    assert speed["asked_now"] == 3
    assert speed["cost_per_1000_items"] == pytest.approx(1000 * 36 / 3600 / speed["items_per_second"], abs=5e-5)
    rows = read_rows(context.out / ANSWERS)
    assert speed["prompt_tokens"] == sum(row.response.prompt_tokens for row in rows) > 0
    free = run(world, tmp_path / "free", config.model_copy(update={"price_per_hour": None}))
    assert (free / REPORT).read_bytes() == (context.out / REPORT).read_bytes()


def test_a_model_is_not_scored_on_what_it_learned_from(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    records = [{"id": pair.id, "prompt": pair.prompt, "completion": pair.completion} for pair in PAIRS]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = publish(world.store, "dataset", f"learned-{tmp_path.name}", folder, {})
    copy = tmp_path / "model"
    shutil.copytree(world.inputs["models.finetuned"].path, copy)
    (copy / "manifest.json").unlink()
    model = publish(world.store, "model", f"learned-{tmp_path.name}", copy, {"data": data})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": r["prompt"].upper()}) + "\n" for r in records))
    source = {"format": "jsonl", "evaluation": str(tmp_path / "t.jsonl"), "get": "it"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"description": "d", "kind": "language_modelling", "data": source}))
    config = TasksConfig(models={"m": "x"}, tasks=(str(tmp_path / "t.yaml"),))
    with pytest.raises(DataError, match="learned from dataset/learned"):
        TasksStage().run(config, {"models.m": model}, stage_context(tmp_path, world.store))


def test_a_model_is_not_scored_on_documents_of_its_corpus(world: World, tmp_path: Path) -> None:
    def asked(name: str, texts: list[str]) -> Any:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = {"format": "jsonl", "evaluation": str(tmp_path / f"{name}.jsonl"), "get": "it"}
        task = {"description": "d", "kind": "language_modelling", "data": source}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
        config = TasksConfig(models={"m": "x"}, tasks=(str(tmp_path / f"{name}.yaml"),))
        model = {"models.m": world.inputs["models.finetuned"]}
        return TasksStage().run(config, model, stage_context(tmp_path / name, world.store))

    with pytest.raises(DataError, match=r"learned from corpus/demo-corpus@1, which holds its items; .*8 of 100"):
        asked("learned", [*TRAINED_ON, *(f"text {n}" for n in range(92))])
    asked("unseen", [*TEXTS, "text"])
    report = TasksReport.load(tmp_path / "unseen" / "out")
    assert report.models["m"].tasks["unseen"].lineage["corpus/demo-corpus@1"] == "clean"


def test_windows_predict_every_token_once_with_as_many_before_it_as_fit() -> None:
    assert windows([1, 5, 6, 7], known=1, window=4, stride=4) == [([1, 5, 6, 7], 3)]
    ids = [1, *range(10, 20)]
    assert windows(ids, known=1, window=4, stride=4) == [
        ([1, 10, 11, 12, 13], 4), ([13, 14, 15, 16, 17], 4), ([15, 16, 17, 18, 19], 2),
    ]  # fmt: skip
    assert windows(ids, known=9, window=4, stride=4) == [([15, 16, 17, 18, 19], 2)]
    sliding = windows(ids, known=1, window=4, stride=1)
    assert sum(count for _, count in sliding) == 10
    assert all(len(row) == 5 for row, _ in sliding)


def test_comparing_reports_tells_what_changed_and_refuses_what_was_asked_otherwise(
    world: World, tasks, reported: Path, tmp_path: Path
) -> None:
    names = (tasks["reading"], tasks["classes"])
    other = run(world, tmp_path / "a", TasksConfig(models={"p": "x"}, tasks=names, shots=2), model="pretrained")
    found = {(c.task, c.metric): c for c in compare_reports(other, reported, (None, "m"))}
    reading = found["reading", "bits_per_byte"]
    assert reading.result.difference.value == pytest.approx(reading.result.second - reading.result.first, abs=1e-5)
    assert len(reading.better) + len(reading.worse) == 8
    same = compare_reports(other, other, (None, "p"))
    assert {c.result.verdict for c in same} == {"noise"}
    fewer = run(world, tmp_path / "b", TasksConfig(models={"p": "x"}, tasks=names, shots=1))
    with pytest.raises(DataError, match="other examples"):
        compare_reports(fewer, reported, (None, None))
    with pytest.raises(ConfigError, match="no such model"):
        compare_reports(reported, reported, ("q", None))


@contextmanager
def served(world: World, trouble: Callable[[int], tuple[int, bytes] | None]) -> Iterator[str]:
    """An endpoint over the engine; `trouble` gives the status and body of some of its requests, counted from 0."""
    engine = Engine.load(world.inputs["models.finetuned"].path)
    lock, seen = threading.Lock(), [0]

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        ids = tuple(engine.text.encode(body["prompt"]))
        scored = 0 if body.get("echo") else None
        sampling = Sampling(
            max_new_tokens=body["max_tokens"], temperature=body["temperature"], prompt_logprobs=scored,
            stop=tuple(body.get("stop", ())), seed=body.get("seed", 0),
        )  # fmt: skip
        (done,) = engine.generate([Request("x", ids, sampling)])
        scores = [None, *(entry.logprob for entry in done.prompt_logprobs or ())]
        offsets = [len(engine.text.decode(ids[:n])) for n in range(len(ids))]
        logprobs = {"text_offset": offsets, "token_logprobs": scores} if body.get("echo") else None
        choice = {"text": done.text, "finish_reason": done.finish_reason, "logprobs": logprobs}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(done.token_ids)}}

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        with lock:
            number = seen[0]
            seen[0] += 1
            return trouble(number) or (200, json.dumps(complete(body)).encode())

    with endpoint("m", answer) as url:
        yield url


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_FIRST_PAUSE_SECONDS", 0.001)


@pytest.mark.usefixtures("impatient")
def test_an_endpoint_gives_the_same_answers_through_429_500_and_garbage(
    world: World, tasks, reported: Path, tmp_path: Path
) -> None:
    troubles = [(429, b"{}"), (500, b"oops"), (200, b"<html>"), (200, b'{"choices": []}'), None, None]
    with served(world, lambda n: troubles[n % len(troubles)]) as url:
        config = TasksConfig(models={"folder": url}, tasks=(tasks["classes"], tasks["writing"]), shots=2, parallel=1)
        out = run(world, tmp_path, config)
    for name in ("classes", "writing"):
        mine, local = (read_rows(f / ANSWERS, model=m, task=name) for f, m in ((out, "folder"), (reported, "m")))
        for row, expected in zip(mine, local, strict=True):
            assert row.response.texts == expected.response.texts
            assert row.response.logprobs == pytest.approx(expected.response.logprobs, abs=1e-4)


@pytest.mark.usefixtures("impatient")
def test_items_that_an_endpoint_never_answers_are_counted_as_wrong(world: World, tasks, tmp_path: Path) -> None:
    with served(world, lambda n: (503, b"busy") if n >= 4 else None) as url:
        out = run(world, tmp_path, TasksConfig(models={"folder": url}, tasks=(tasks["writing"],), parallel=1))
    report = TasksReport.load(out)
    assert report.models["folder"].tasks["writing"].failed == 4
    assert "503" in str(read_rows(out / ANSWERS)[7].response.error)


@pytest.mark.usefixtures("impatient")
def test_what_an_endpoint_refuses_for_all_ends_the_run(world: World, tasks, tmp_path: Path) -> None:
    with served(world, lambda _: (401, b"no key")) as url:
        with pytest.raises(ConfigError, match="401"):
            run(world, tmp_path, TasksConfig(models={"folder": url}, tasks=(tasks["writing"],)))
        other = TasksConfig(models={"folder": url.replace("#m", "#other")}, tasks=(tasks["writing"],))
        with pytest.raises(ConfigError, match="no such model"):
            TasksStage().sources(other)
        with pytest.raises(ConfigError, match="tokenizer"):
            run(world, tmp_path, TasksConfig(models={"folder": url}, tasks=(tasks["reading"],)))


def test_the_fingerprint_follows_the_task_and_its_data_but_not_their_place(tasks, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        task = yaml.safe_load(Path(tasks["reading"]).read_text())
        task["data"]["evaluation"] = str(folder / "scored.jsonl")
        (folder / "reading.yaml").write_text(yaml.safe_dump(task))
        config = TasksConfig(models={"m": "x"}, tasks=(str(folder / "reading.yaml"),))
        return TasksStage().sources(config)["tasks.reading"]

    shutil.copyfile(Path(tasks["reading"]).parent / "scored.jsonl", tmp_path / "scored.jsonl")
    before = digest(tmp_path)
    assert before == TasksStage().sources(TasksConfig(models={"m": "x"}, tasks=(tasks["reading"],)))["tasks.reading"]
    (tmp_path / "scored.jsonl").write_text('{"text": "x", "kind": 0}\n')
    assert digest(tmp_path) != before
