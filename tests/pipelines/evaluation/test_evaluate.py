"""The evaluate stage with tiny real models."""

from __future__ import annotations

import json

import pytest
from evaluation_world import CONFIG, PAIRS, read_answers, stage_context

from actors.store.tracker import JsonLinesTracker
from configs.errors import ContractError
from pipelines.evaluation.report import Report
from pipelines.stages.evaluate import EvaluateStage


def test_a_model_that_knows_the_answers_beats_one_that_knows_nothing(evaluated):
    report = Report.load(evaluated.path)
    old, new = report.models["pretrained"], report.models["finetuned"]
    assert (new.scores["rouge_l"].value, new.scores["chrf"].value) == (100.0, 100.0)
    assert old.scores["rouge_l"].value < 50.0
    assert old.scores["chrf"].value < 50.0
    assert report.pairs == {"summary": 2, "signature": 2}
    assert report.too_long == {"summary": 0, "signature": 1}
    assert old.bits_per_byte > 0


def test_every_answer_is_kept_with_its_score(evaluated):
    rows = {row["id"]: row for row in read_answers(evaluated.path)}
    assert sorted(rows) == ["g0", "g1", "s0", "s1"]
    for pair in PAIRS[:4]:
        row = rows[pair.id]
        assert (row["prompt"], row["reference"]) == (pair.prompt, pair.completion)
        assert row["answers"]["finetuned"] == {"text": pair.completion, "score": 100.0, "finish_reason": "stop"}
        assert set(row["answers"]) == {"pretrained", "finetuned"}


def test_a_run_resumed_after_the_first_model_gives_the_same_files(world, evaluated, tmp_path):
    class KilledError(Exception):
        pass

    def die_at_the_second_model(progress):
        if progress.done > 4:
            raise KilledError

    with pytest.raises(KilledError):
        EvaluateStage().run(
            CONFIG, world.inputs, stage_context(tmp_path, world.store, progress=die_at_the_second_model)
        )
    seen = []
    context = stage_context(tmp_path, world.store, progress=seen.append)
    summary = EvaluateStage().run(CONFIG, world.inputs, context)
    assert seen[0].done == 4, "the first model is not asked again"
    assert (seen[-1].done, seen[-1].total) == (8, 8)
    for record in evaluated.manifest.files:
        assert (context.out / record.path).read_bytes() == (evaluated.path / record.path).read_bytes(), record.path
    assert summary["models"]["finetuned"]["rouge_l"] == 100.0
    assert len(summary["examples"]) == 4


def test_table_picture_scores_and_data_reach_the_tracker(world, tmp_path):
    tracker = JsonLinesTracker(tmp_path / "tracking")
    run = tracker.run("k", "evaluate")
    EvaluateStage().run(CONFIG, world.inputs, stage_context(tmp_path / "stage", world.store, run))
    (lines,) = (tmp_path / "tracking").glob("*/*.jsonl")
    text = lines.read_text()
    assert '"finetuned/rouge_l": 100.0' in text
    assert '"context": "evaluation"' in text
    kept = {path.name for path in (tmp_path / "tracking").rglob("*.files/*/*")}
    assert kept == {"scores.png", "answers.json"}


def test_a_corpus_of_another_tokenizer_is_refused(world, tmp_path):
    corpus = world.inputs["corpus"]
    other = tmp_path / "corpus"
    other.mkdir()
    index = json.loads((corpus.path / "index.json").read_text())
    (other / "index.json").write_text(json.dumps({**index, "contract": "0" * 64}))
    inputs = {**world.inputs, "corpus": type(corpus)(corpus.manifest, other)}
    with pytest.raises(ContractError, match=r"models\.pretrained.*another tokenizer"):
        EvaluateStage().run(CONFIG, inputs, stage_context(tmp_path / "stage", world.store))
