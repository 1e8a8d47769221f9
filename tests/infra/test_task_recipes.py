"""The recipes for tasks run from the command line, on their real data, a few steps of every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.load import load_recipe
from tests.infra.conftest import ROOT, command_environment

DATA = Path(os.environ.get("GANYMEDE_DATA", ROOT.parent / "shared" / "data"))
TINY = {"steps": 4, "batch_rows": 8, "micro_batch_rows": 4, "eval_every_steps": 2, "eval_rows": 8, "workers": 1}
DIALS = {"hidden_size": 32, "layers": 1, "heads": 1}


def overrides(recipe: str) -> Iterator[str]:
    """Settings that make a recipe small; what it is made of stays."""
    for name, stage in load_recipe(recipe).stages.items():
        if stage.kind == "tokenizer":
            yield from (f"stages.{name}.vocab_size=500", f"stages.{name}.sample_bytes=100000")
        if stage.kind in ("pretrain", "finetune"):
            yield from (f"stages.{name}.training.{key}={value}" for key, value in TINY.items())
            if stage.model.start is None:
                yield from (f"stages.{name}.model.{key}={value}" for key, value in DIALS.items())


def run(home: Path, recipe: str, data: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {**command_environment(home), "GANYMEDE_DATA": "" if data is None else str(data)}
    sets = [part for override in overrides(recipe) for part in ("--set", override)]
    command = [sys.executable, "-m", "infra.cli.main", "run", recipe, "--tracker", "none", "--json", *sets]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


EXPECTED = {
    "sentiment": {"baseline": "accuracy", "pretrain": "validation_accuracy", "finetune": "validation_macro_f1"},
    "entities": {
        "baseline": "span_f1",
        "pretrain": "validation_accuracy",
        "finetune": "validation_span_f1",
        "posts_baseline": "span_f1",
        "posts_finetune": "validation_span_f1",
    },
    "translation": {"baseline": "bleu", "finetune": "bleu"},
    "summaries": {"baseline": "rouge_2", "finetune": "rouge_2"},
    "rnn_vs_transformer": {"transformer": "bits_per_byte", "lstm": "bits_per_byte"},
}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_runs_from_its_data_to_its_scores(tmp_path: Path, recipe: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"the recipes' data is not there: no folder {DATA} (GANYMEDE_DATA)")
    done = run(tmp_path / "home", recipe, DATA)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = {outcome["stage"]: outcome["summary"] for outcome in json.loads(done.stdout)["outcomes"]}
    for stage, figure in EXPECTED[recipe].items():
        assert 0.0 <= outcomes[stage][figure] <= 100.0
    if recipe in ("translation", "summaries"):
        (card,) = (tmp_path / "home/artifacts/model").glob("*-finetune@1/README.md")
        assert "| BLEU signature | `nrefs:1" in card.read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_a_recipe_whose_data_is_not_there_says_so_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "home", "translation", None)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "GANYMEDE_DATA" in line and "error" in line.lower()]
    assert "data:multi30k-en-fr" in line
