"""The same weights and items give what lm-eval says of them: likelihoods to four decimals, greedy answers exactly.

lm-eval lives in an environment of its own (extra `eval-peers`): `LM_EVAL=/path/to/lm-eval` unless it is on the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_world import TEXTS, World, stage_context

from configs.schema.evaluation import TasksConfig
from pipelines.evaluation.asking import Row, read_rows
from pipelines.evaluation.task_report import ANSWERS, TasksReport
from pipelines.stages.tasks import TasksStage

LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm-eval")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LM_EVAL is None, reason="lm-eval is not here: pip install ganymede[eval-peers], or set LM_EVAL"),
]

ARTICLES = ["".join(TEXTS[n : n + size]) for n, size in ((0, 1), (3, 7), (11, 12), (30, 2))]
QUESTIONS = [
    {"q": f"def add_{n}(a):\n  return", "options": [f"a + b + {n}", f"{n}", "class Thing", "naïve"], "right": n % 4}
    for n in range(12)
] + [{"q": "long " * 90, "options": ["short", "a much longer choice of words"], "right": 1},
     {"q": "ends in blanks  ", "options": ["a", "def add"], "right": 0}]  # fmt: skip
PROMPTS = [{"q": f"def add_{n}(a,", "a": " b):"} for n in range(10)] + [{"q": "word " * 90, "a": "x"}]

OURS: dict[str, dict[str, Any]] = {
    "articles": {"kind": "language_modelling", "metrics": ["bits_per_byte", "perplexity"]},
    "questions": {"kind": "multiple_choice", "prompt": "{q}", "choices": "options", "label": "right"},
    "prompts": {
        "kind": "generation", "prompt": "{q}", "answer": "{a}", "metrics": ["exact_match"],
        "answering": {"max_new_tokens": 16, "stop": ["\n\n"]},
    },
}  # fmt: skip
THEIRS: dict[str, dict[str, Any]] = {
    "articles": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "questions": {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}",
        "doc_to_target": "{{right}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    },
    "prompts": {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    (folder / "articles.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ARTICLES))
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return folder


@pytest.fixture(scope="module")
def ours(world: World, data: Path, tmp_path_factory) -> tuple[TasksReport, dict[str, list[Row]]]:
    for name, task in OURS.items():
        source = {"format": "jsonl", "evaluation": str(data / f"{name}.jsonl"), "get": "it here"}
        (data / f"{name}.yaml").write_text(yaml.safe_dump({"description": name, "data": source, **task}))
    config = TasksConfig(models={"m": "x"}, tasks=tuple(str(data / f"{name}.yaml") for name in OURS))
    context = stage_context(tmp_path_factory.mktemp("ours"), world.store)
    TasksStage().run(config, {"models.m": world.inputs["models.finetuned"]}, context)
    rows = {name: read_rows(context.out / ANSWERS, model="m", task=name) for name in OURS}
    return TasksReport.load(context.out), rows


@pytest.fixture(scope="module")
def theirs(world: World, data: Path, tmp_path_factory) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What lm-eval reports, and its samples by task in the order of the documents."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "tasks").mkdir()
    for name, task in THEIRS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data / f"{name}.jsonl")}}}
        content = {"task": f"parity_{name}", **files, "test_split": "test", **task}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    model = world.inputs["models.finetuned"].path
    subprocess.run(
        [
            str(LM_EVAL), "run", "--model", "hf", "--device", "cpu",
            "--model_args", f"pretrained={model},dtype=float32",
            "--tasks", ",".join(f"parity_{name}" for name in THEIRS), "--include_path", str(folder / "tasks"),
            "--batch_size", "1", "--output_path", str(folder / "out"), "--log_samples",
        ],
        check=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}, timeout=280,
    )  # fmt: skip
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {}
    for name in THEIRS:
        (path,) = (folder / "out").rglob(f"samples_parity_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"], samples


def test_documents_are_as_likely_as_lm_eval_finds_them(ours, theirs) -> None:
    for row, sample in zip(ours[1]["articles"], theirs[1]["articles"], strict=True):
        assert row.response.logprobs[0] == pytest.approx(float(sample["resps"][0][0]), abs=1e-4 * row.response.tokens)
    found = ours[0].models["m"].tasks["articles"].scores["bits_per_byte"].value
    assert round(found, 4) == round(theirs[0]["parity_articles"]["bits_per_byte,none"], 4)


def test_choices_are_as_likely_as_lm_eval_finds_them_and_scores_are_equal(ours, theirs) -> None:
    for row, sample in zip(ours[1]["questions"], theirs[1]["questions"], strict=True):
        said = [float(answer[0][0]) for answer in sample["resps"]]
        assert row.response.logprobs == pytest.approx(said, abs=1e-4)
    scores = ours[0].models["m"].tasks["questions"].scores
    assert scores["acc"].value == pytest.approx(theirs[0]["parity_questions"]["acc,none"], abs=1e-6)
    assert scores["acc_norm"].value == pytest.approx(theirs[0]["parity_questions"]["acc_bytes,none"], abs=1e-6)


def test_greedy_answers_are_lm_evals_to_the_character(ours, theirs) -> None:
    assert [row.response.texts[0] for row in ours[1]["prompts"]] == [
        sample["resps"][0][0] for sample in theirs[1]["prompts"]
    ]
    found = ours[0].models["m"].tasks["prompts"].scores["exact_match"].value
    assert found == pytest.approx(theirs[0]["parity_prompts"]["exact_match,none"], abs=1e-6)
