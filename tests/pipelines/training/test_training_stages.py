"""Pretraining and fine-tuning on real Ray Train workers, from corpus to model folder."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.tracker import JsonLinesTracker
from configs.schema.project import Recipe
from configs.schema.training import PretrainConfig
from pipelines.runner import Runner, RunReport
from pipelines.stage import Progress
from pipelines.stages.corpus import CorpusStage
from pipelines.stages.finetune import FinetuneStage
from pipelines.stages.instructions import InstructionsStage
from pipelines.stages.pretrain import PretrainStage, open_split
from pipelines.stages.tokenizer import TokenizerStage

pytestmark = pytest.mark.ray

SOURCE = {"path": "python:stdlib", "include": ["json/*.py", "asyncio/*.py", "email/*.py"]}
SPLIT = {"validation_fraction": 0.2}
TRAINING = {
    "batch_rows": 8, "micro_batch_rows": 2, "eval_rows": 4, "log_every_steps": 5, "checkpoint_every_seconds": 0.2,
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "tokenizer": {"source": SOURCE, "split": SPLIT, "vocab_size": 600, "sample_bytes": 100_000},
    "corpus": {"tokenizer": "tokenizer", "source": SOURCE, "split": SPLIT},
    "instructions": {"source": SOURCE, "split": SPLIT},
    "pretrain": {
        "corpus": "corpus",
        "model": {"hidden_size": 32, "layers": 2, "heads": 2, "context_length": 128},
        "training": {**TRAINING, "steps": 150, "eval_every_steps": 50},
    },
    "finetune": {
        "model": "pretrain",
        "data": "instructions",
        "training": {**TRAINING, "steps": 20, "eval_every_steps": 10},
    },
    "adapters": {
        "kind": "finetune",
        "model": "pretrain",
        "data": "instructions",
        "lora": {"rank": 4},
        "training": {**TRAINING, "steps": 20, "eval_every_steps": 10},
    },
}


class Watcher:
    """Remembers progress; does `act` the first time pretraining passes `at` steps."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at: float = at
        self.act = act
        self.steps: list[tuple[str, float]] = []
        self.notes: list[str] = []

    def stage_started(self, name: str, kind: str) -> None: ...

    def stage_finished(self, name: str, outcome: Any) -> None: ...

    def stage_progress(self, name: str, progress: Progress) -> None:
        if progress.note:
            self.notes.append(progress.note)
        elif progress.unit == "step":
            self.steps.append((name, progress.done))
        if name == "pretrain" and progress.done >= self.at:
            self.at = float("inf")
            self.act()


def training_workers() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if "RayTrainWorker" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run(home: Path, observer: Watcher, stages: dict[str, dict[str, Any]] = STAGES) -> tuple[RunReport, ArtifactStore]:
    store = ArtifactStore(home / "artifacts")
    kinds = (TokenizerStage(), CorpusStage(), InstructionsStage(), PretrainStage(), FinetuneStage())
    tracker = JsonLinesTracker(home / "tracking")
    recipe = Recipe.model_validate({"name": "tiny", "stages": stages})
    report = Runner(recipe, store, tracker, home, {stage.kind: stage for stage in kinds}, observer).run()
    tracker.close(5.0)
    return report, store


def interrupt() -> None:
    raise KeyboardInterrupt


def kill_a_worker() -> None:
    os.kill(training_workers()[0].pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_an_interrupted_run_goes_on_and_outlives_a_killed_worker(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Watcher(20, interrupt))
    (checkpoint, *_) = sorted((tmp_path / "work").glob("model-*/checkpoints/step-*"), reverse=True)
    assert not [t for t in threading.enumerate() if t.name == "ray-train"]

    watcher = Watcher(100, kill_a_worker)
    report, store = run(tmp_path, watcher)
    assert watcher.at == float("inf")
    steps = [step for name, step in watcher.steps if name == "pretrain"]
    assert steps == sorted(set(steps))
    assert steps[-1] == STAGES["pretrain"]["training"]["steps"]
    assert int(checkpoint.name.removeprefix("step-")) >= 20
    for name, outcome in zip(STAGES, report.outcomes, strict=True):
        if name in ("pretrain", "finetune", "adapters") and outcome.ref:
            check_model_folder(store.get(outcome.ref))
            assert outcome.summary["validation_loss"] < outcome.summary["first_loss"]
            assert (outcome.summary["trained_parameters"] < outcome.summary["parameters"]) == (name == "adapters")


def check_model_folder(artifact: Artifact) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    assert model.generation_config.eos_token_id == [0, 4]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert len(chat["input_ids"]) > 2
    for name in ("contract.json", "README.md", "loss.png"):
        assert (artifact.path / name).stat().st_size > 100


@pytest.mark.slow  # 46 s, of which two training stages take the most
@pytest.mark.timeout(240)
def test_a_recipe_trains_on_a_mixture_of_best_fit_packed_corpora(cluster: None, tmp_path: Path) -> None:
    steps, change = 12, 8
    phases = [{"weights": {"web": 3, "mail": 1}}, {"from_step": change, "weights": {"web": 1, "mail": 1}}]
    stages = {
        "tokenizer": STAGES["tokenizer"],
        "web": {**STAGES["corpus"], "kind": "corpus", "source": {**SOURCE, "include": ["asyncio/*.py"]}},
        "mail": {**STAGES["corpus"], "kind": "corpus", "source": {**SOURCE, "include": ["email/*.py"]}},
        "pretrain": {
            **STAGES["pretrain"],
            "corpus": {"web": "web", "mail": "mail"},
            "data": {"packing": "best_fit", "mixture": phases},
            "training": {**TRAINING, "steps": steps, "eval_every_steps": 6, "eval_rows": 8},
        },
    }
    watcher = Watcher(1000, interrupt)
    report, store = run(tmp_path, watcher, stages)
    outcome = report.outcomes[-1]
    assert outcome.ref
    model = store.get(outcome.ref)
    check_model_folder(model)
    assert set(model.manifest.inputs) == {"corpus.web", "corpus.mail"}

    summary, rows = outcome.summary, STAGES["pretrain"]["training"]["batch_rows"]
    (note,) = watcher.notes
    assert note.startswith(f"preflight: {summary['parameters']:,} parameters, {steps * rows * 128:,} tokens, ")
    predicted, measured = summary["preflight"]["predicted"], summary["preflight"]["measured"]
    assert predicted["positions"] == steps * rows * 128
    assert 0.3 < predicted["worker_bytes"] / measured["worker_bytes"] < 3
    assert min(predicted["tokens_per_second"], measured["tokens_per_second"]) > 0
    described = summary["data"]["corpora"]
    assert {name: one["samples"] for name, one in described.items()} == {
        "web": rows * (change * 3 // 4 + (steps - change) // 2), "mail": rows * (change // 4 + (steps - change) // 2),
    }  # fmt: skip
    for one in described.values():
        assert 0.9 < one["utilisation"] <= 1
        assert 0 < one["truncation"] <= 1
        assert one["dropped_tokens"] == 0
    losses = [summary["validation_loss/web"], summary["validation_loss/mail"]]
    assert min(losses) < summary["validation_loss"] < max(losses)
    assert summary["validation_loss"] < summary["first_loss"]

    config = Recipe.model_validate({"name": "tiny", "stages": stages}).stages["pretrain"]
    assert isinstance(config, PretrainConfig)
    folders = {name: store.get(f"corpus/tiny-{name}@1").path for name in ("web", "mail")}
    ledger = open_split("train", corpora=folders, config=config, row_tokens=128, indexes=tmp_path / "indexes").ledger
    shares = [(ledger(step)[:, 0] == 0).sum() for step in range(steps)]
    assert shares == [rows * 3 // 4] * change + [rows // 2] * (steps - change)
