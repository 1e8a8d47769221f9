"""lm-eval asks the endpoint (`local-completions`) and finds what it finds by itself (`hf`) in the same weights.

It sends token ids in batches, `echo` with `logprobs`, and `max_tokens` 0 or 1. The texts fit the window: longer ones it
cuts one token earlier for an endpoint than for `hf`, so that they are not the same question. It lives in an environment
of its own (extra `eval-peers`): `LM_EVAL=/path/to/lm-eval` unless it is on the PATH.
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

from tests.serving.conftest import local_endpoint

LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm-eval")
WINDOW = 2048
ARTICLES = [{"text": "def open(path, mode): return the file at the path. " * size} for size in (1, 3, 40)]
QUESTIONS = [
    {"q": f"def open_{n}(path):\n  return", "options": [f" file {n}", " the path", " x", " naïve 🦉"], "right": n % 4}
    for n in range(16)
]
PROMPTS = [{"q": f"def open_{n}(", "a": "path):"} for n in range(6)]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "articles": (ARTICLES, {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }),
    "questions": (QUESTIONS, {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}",
        "doc_to_target": "{{right}}", "metric_list": [{"metric": "acc"}],
    }),
    "prompts": (PROMPTS, {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }),
}  # fmt: skip

Responses = dict[str, list[Any]]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(LM_EVAL is None, reason="lm-eval is not here: pip install ganymede[eval-peers], or set LM_EVAL")
def test_likelihoods_and_answers_are_those_that_lm_eval_finds_itself(model_folder: Path, tmp_path: Path) -> None:
    _write_tasks(tmp_path)
    own = _responses(tmp_path, "hf", f"pretrained={model_folder},dtype=float32,max_length={WINDOW}", batch=1)
    with local_endpoint(model_folder) as url:
        asked = f"model=tiny,base_url={url}/v1/completions,tokenizer={model_folder},tokenizer_backend=huggingface"
        arguments = f"{asked},tokenized_requests=True,num_concurrent=2,max_retries=1,max_length={WINDOW}"
        ours = _responses(tmp_path, "local-completions", arguments, batch=3)
    assert ours["prompts"] == own["prompts"]
    assert ours["articles"] == [pytest.approx(each, abs=1e-3) for each in own["articles"]]
    for found, said in zip(ours["questions"], own["questions"], strict=True):
        assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in said], abs=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in said]


def _write_tasks(folder: Path) -> None:
    (folder / "tasks").mkdir()
    for name, (records, task) in TASKS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        content = {"task": f"served_{name}", **files, "test_split": "test", **task}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))


def _responses(folder: Path, model: str, arguments: str, *, batch: int) -> Responses:
    """What a model of lm-eval's says in each task, in the order of the records."""
    out = folder / model
    tasks = ",".join(f"served_{name}" for name in TASKS)
    command = [
        *(str(LM_EVAL), "run", "--model", model, "--model_args", arguments, "--batch_size", str(batch)),
        *("--tasks", tasks, "--include_path", str(folder / "tasks"), "--output_path", str(out), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OPENAI_API_KEY": "unused"}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    found: Responses = {}
    for name in TASKS:
        (path,) = out.rglob(f"samples_served_{name}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found[name] = [_said(name, sample["resps"]) for sample in samples]
    return found


def _said(task: str, responses: Any) -> Any:
    if task == "questions":
        return [(float(each[0][0]), str(each[0][1]) == "True") for each in responses]
    return float(responses[0][0]) if task == "articles" else responses[0][0]
