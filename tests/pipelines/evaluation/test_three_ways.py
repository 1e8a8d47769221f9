"""The same items through the trainer that made a model, the engine and an endpoint give the same scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from evaluation_world import World, stage_context

from actors.text import Text
from configs.schema.evaluation import TasksConfig
from pipelines.evaluation.asking import Row, read_rows
from pipelines.evaluation.task_report import ANSWERS, Scores, TasksReport
from pipelines.evaluation.writing import text_scores, write_texts
from pipelines.stages.tasks import TasksStage
from pipelines.training.models import load_model
from pipelines.training.objectives import LanguageObjective, Rows
from pipelines.training.pairs import PairRows, render_pairs
from tests.pipelines.training.test_supervised import EXAMPLES, scratch, train
from tests.pipelines.training.test_supervised import world as trained_world
from tests.serving.conftest import local_endpoint

__all__ = ["trained_world"]
QUESTIONS = [{"text": f"def add_{n}", "answers": ["(a, b):", " value", f" = class Thing{n}"]} for n in range(6)]


def asked(folder: Path, records: list[dict[str, Any]], models: dict[str, str], **task: Any) -> dict[str, Any]:
    """The scores and rows of each model on one task."""
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"format": "jsonl", "evaluation": f"{folder}/items.jsonl", "get": "it here"}
    (folder / "t.yaml").write_text(yaml.safe_dump({"description": "d", "data": data, **task}))
    context = stage_context(folder, None)  # type: ignore[arg-type]  # no artifact, no lineage
    TasksStage().run(TasksConfig(models=models, tasks=(f"{folder}/t.yaml",)), {}, context)
    report = TasksReport.load(context.out)
    return {
        name: (report.models[name].tasks["t"], read_rows(context.out / ANSWERS, model=name, task="t"))
        for name in models
    }


def trainers_nats(folder: Path, work: Path) -> list[float]:
    """The loss of every answer in training, without the token that ends texts."""
    lines = [{"prompt": q["text"], "completion": answer} for q in QUESTIONS for answer in q["answers"]]
    (work / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        render_pairs(work / "pairs.jsonl", work / "rows.safetensors", Text.load(folder), row_tokens=64, chat=False) == 0
    )
    rows, model, objective = PairRows.open(work / "rows.safetensors"), load_model(folder).eval(), LanguageObjective()
    found = []
    for number in range(len(rows)):
        ids, prompt = rows[number]
        targets = torch.arange(1, len(ids) - 1) >= prompt
        with torch.no_grad():
            measured = objective.measure(model, Rows(torch.from_numpy(ids[None, :-1]), targets[None]))
        found.append(float(measured[0]))
    return found


def test_a_decoders_likelihoods(world: World, tmp_path: Path) -> None:
    folder = world.inputs["models.finetuned"].path
    nats = trainers_nats(folder, tmp_path)
    with local_endpoint(folder) as url:
        models = {"engine": str(folder), "endpoint": f"{url}/v1#tiny"}
        found = asked(
            tmp_path / "asked", QUESTIONS, models, kind="multiple_choice", delimiter="", prompt="{text}",
            choices="answers", answer="(a, b):",
        )  # fmt: skip
    (engine, rows), (endpoint, others) = found["engine"], found["endpoint"]
    assert [-value for row in rows for value in row.response.logprobs] == pytest.approx(nats, abs=1e-4)
    assert [-value for row in others for value in row.response.logprobs] == pytest.approx(nats, abs=1e-4)
    right = [min(range(3), key=nats[3 * n : 3 * n + 3].__getitem__) == 0 for n in range(len(QUESTIONS))]
    assert engine.scores["acc"].value == endpoint.scores["acc"].value == sum(right) / len(right)
    assert engine.scores["acc_norm"] == endpoint.scores["acc_norm"]


def test_an_encoders_classes(trained_world: Path, tmp_path: Path) -> None:
    summary, folder = train(trained_world, tmp_path / "work", scratch("bert"), "classify")
    records = EXAMPLES["classify"][:16]  # as many as training evaluates
    task = {"kind": "classification", "choices": ["bad", "good"], "answer": "{label}"}
    engine, rows = asked(tmp_path / "asked", records, {"engine": str(folder)}, **task)["engine"]
    assert engine.scores["accuracy"].value == summary["validation_accuracy"]
    assert mean_nats(rows) == pytest.approx(summary["validation_loss"], abs=1e-4)
    with local_endpoint(folder) as url:
        said = httpx.post(f"{url}/v1/classify", json={"model": "tiny", "input": [r["text"] for r in records]}).json()
    for one, row in zip(said["data"], rows, strict=True):
        assert one["label"] == row.prediction
        scores = dict(zip(one["labels"], one["probs"], strict=True))
        assert [math.log(scores[c]) for c in row.choices] == pytest.approx(row.response.logprobs, abs=1e-4)


def mean_nats(rows: list[Row]) -> float:
    return -sum(row.response.logprobs[row.choices.index(row.references[0])] for row in rows) / len(rows)


def test_what_an_encoder_decoder_writes(trained_world: Path, tmp_path: Path) -> None:
    _, folder = train(trained_world, tmp_path / "work", scratch("t5"), "seq2seq")
    records = EXAMPLES["seq2seq"][:6]
    text = Text.load(folder)
    sources = [list(text.encode_input(record["prompt"]).token_ids) for record in records]
    ids = write_texts(load_model(folder, "seq2seq"), sources, pad=0, max_new_tokens=8, progress=lambda done: None)
    trainers, _ = text_scores([r["completion"] for r in records], [text.decode(line).strip() for line in ids])
    task = {"kind": "generation", "prompt": "{prompt}", "answer": "{completion}", "metrics": ["chrf", "rouge_l"],
            "answering": {"max_new_tokens": 8}}  # fmt: skip
    with local_endpoint(folder) as url:
        models = {"engine": str(folder), "endpoint": f"{url}/v1#tiny"}
        found = asked(tmp_path / "asked", records, models, **task)
    for made, _ in found.values():
        scores: Scores = made
        assert {name: scores.scores[name].value for name in ("chrf", "rouge_l")} == pytest.approx(
            {name: trainers[name] for name in ("chrf", "rouge_l")}, abs=1e-4
        )
