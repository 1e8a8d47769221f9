"""`ganymede evaluate` against lm-eval's `hf` models: SST-2's development set answered in words, few-shot.

    python -m benchmarks.evaluation [--quick] [--json] [--lm-eval PATH] [--model FOLDER]

Both get the same 872 prompts (four examples each, the same for all), the same weights in fp32 and the same cores, and
answer greedily with at most eight tokens; lm-eval finds its batch size itself. A time is that of the whole command, as
a person waits for it. lm-eval is in an environment of its own (extra `eval-peers`). Unless a model is named, it is one
of 17 million parameters with random weights. A full run keeps its results in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.engine_models import model_folder
from benchmarks.measuring import command, keep, machine, versions
from configs.load import load_task
from pipelines.evaluation.asking import read_rows
from pipelines.evaluation.items import full_prompt, load_items
from pipelines.evaluation.task_report import ANSWERS

ROOT = Path(__file__).parents[1]
SHOTS = 4
TOKENS = 8


def main() -> int:
    """Prints a page (or JSON)."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = options.model or model_folder("17m", options.work)
    count = _write_tasks(options.work, 64 if options.quick else None)
    ours, theirs = [], []
    for number in range(1 if options.quick else options.runs):
        ours.append(_ours(folder, options.work, number))
        theirs.append(_theirs(folder, options.work, options.lm_eval))
    seconds = {"ganymede evaluate": [run["seconds"] for run in ours], "lm-eval": [run["seconds"] for run in theirs]}
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    equal = sum(a == b for a, b in zip(ours[0]["answers"], theirs[0]["answers"], strict=True))
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command(),
        "machine": machine(),
        "versions": versions("torch", "transformers"),
        "items": count,
        "shots": SHOTS,
        "seconds": seconds,
        "items_per_second": {name: count / median for name, median in medians.items()},
        "speed_against_lm_eval": medians["lm-eval"] / medians["ganymede evaluate"],
        "equal_answers": equal / count,
    }
    page = _page(document)
    if not options.quick:
        print(f"kept as {keep('evaluation', document, page).relative_to(ROOT)}", file=sys.stderr)
    print(json.dumps(document, indent=2) if options.json else page)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run over 64 items, nothing kept")
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument("--runs", type=int, default=3, help="runs of each, taking turns; the median counts")
    found = os.environ.get("LM_EVAL") or shutil.which("lm-eval")
    parser.add_argument("--lm-eval", default=found, required=found is None, help="lm-eval's command; $LM_EVAL")
    parser.add_argument("--model", type=Path, help="model folder; unset: 17M parameters, random")
    parser.add_argument("--work", type=Path, default=ROOT / ".ganymede/benchmarks/evaluation", help="scratch folder")
    return parser.parse_args()


def _write_tasks(work: Path, limit: int | None) -> int:
    """The same prompts as a task of ours and of lm-eval; returns how many."""
    task = load_task("sst2")
    examples = load_items(task, "train")[:SHOTS]
    items = load_items(task)[:limit]
    lines = [{"prompt": full_prompt(task, item, examples), "answer": item.answer} for item in items]
    (work / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"format": "jsonl", "evaluation": str((work / "prompts.jsonl").absolute()), "get": "SST-2"}
    (work / "words.yaml").write_text(
        yaml.safe_dump(
            {
                "description": "SST-2 in words", "kind": "classification", "method": "generate", "data": data,
                "prompt": "{prompt}", "choices": ["negative", "positive"], "answer": "{answer}",
                "answering": {"max_new_tokens": TOKENS, "stop": ["\n"]},
            }
        )
    )  # fmt: skip
    (work / "lm_eval").mkdir(exist_ok=True)
    (work / "lm_eval/words.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "ganymede_words", "dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str((work / "prompts.jsonl").absolute())}},
                "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": TOKENS, "do_sample": False},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    )  # fmt: skip
    return len(items)


def _ours(folder: Path, work: Path, number: int) -> dict[str, Any]:
    home = (work / f"home{number}").absolute()
    shutil.rmtree(home, ignore_errors=True)
    environment = {"GANYMEDE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "infra.cli.main", "evaluate", str(folder), "--task", str(work / "words.yaml")]
    seconds, printed = _timed([*arguments, "--tracker", "none", "--json"], environment)
    rows = read_rows(Path(json.loads(printed)["folder"]) / ANSWERS)
    return {"seconds": seconds, "answers": [row.response.texts[0] for row in rows]}


def _theirs(folder: Path, work: Path, lm_eval: str) -> dict[str, Any]:
    out = work / "lm_eval_out"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [
        lm_eval,
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype=float32",
        "--device",
        "cpu",
    ]
    arguments += ["--tasks", "ganymede_words", "--include_path", str(work / "lm_eval"), "--batch_size", "auto"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str((work / "datasets").absolute())}
    seconds, _ = _timed([*arguments, "--output_path", str(out), "--log_samples"], environment)
    (path,) = out.rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return {"seconds": seconds, "answers": [sample["resps"][0][0] for sample in samples]}


def _timed(arguments: Sequence[str], environment: dict[str, str]) -> tuple[float, str]:
    began = time.monotonic()
    done = subprocess.run(
        arguments, env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}\nfailed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return time.monotonic() - began, done.stdout


def _page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    facts = document["machine"]
    lines = [
        "# Evaluation",
        "",
        f"{document['date']}; {facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB; load before "
        f"{facts['load_before']}; " + ", ".join(f"{name} {number}" for name, number in document["versions"].items()),
        "",
        f"    {document['command']}",
        "",
        f"SST-2 in words: {document['items']} prompts with {document['shots']} examples, at most {TOKENS} tokens, "
        f"greedy, fp32; {document['equal_answers']:.1%} of the answers are equal to the character.",
        "",
        "| whole command | s (median) | items/s |",
        "|---|---:|---:|",
    ]
    for name, rate in document["items_per_second"].items():
        lines.append(f"| {name} | {document['items'] / rate:.1f} | {rate:.1f} |")
    return "\n".join([*lines, "", f"Ganymede is {document['speed_against_lm_eval']:.1f} times as fast.", ""])


if __name__ == "__main__":
    sys.exit(main())
