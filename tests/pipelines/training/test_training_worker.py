"""A worker process without Ray: what it leaves for the driver, and the artifact made from that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from actors.engine.precision import has_bf16
from actors.store.artifacts import ArtifactStore
from actors.store.tracker import NoTracker
from actors.text import Text
from configs.errors import ConfigError, DataError, StageError
from configs.schema.model import ModelConfig
from configs.schema.training import OptimConfig, TrainingConfig
from pipelines.corpus.tokenizer import save_tokenizer, train_tokenizer
from pipelines.stage import StageContext
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.metrics import FILE, read_metrics
from pipelines.training.models import build_model
from pipelines.training.objectives import Objective, SupervisedPairs
from pipelines.training.pairs import PairRows, render_pairs
from pipelines.training.parallel import Ranks
from pipelines.training.publication import KEPT, Publication, write_model
from pipelines.training.samples import FILE as SAMPLES
from pipelines.training.samples import read_samples
from pipelines.training.worker import CHECKPOINTS, PEAK, STOP, Task, clear_signals, read_failure, run

CPU = torch.device("cpu")
CONFIG = TrainingConfig(steps=8, batch_rows=4, workers=1, eval_every_steps=4, log_every_steps=2, seed=7)


def untrained() -> nn.Module:
    config = ModelConfig(hidden_size=32, layers=1, heads=2, context_length=64)
    return build_model(config, vocab_size=300, eos_token_id=0, seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer, and a few pairs rendered with it."""
    save_tokenizer(train_tokenizer(["def area(radius): return radius ** 2\n" * 50], 300), tmp_path)
    lines = [{"prompt": f"double {i}", "completion": f"{2 * i}"} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    render_pairs(tmp_path / "pairs.jsonl", tmp_path / "pairs", Text.load(tmp_path), row_tokens=64)
    return tmp_path


def make_task(folder: Path, name: str, config: TrainingConfig = CONFIG) -> Task:
    def assemble() -> tuple[nn.Module, Objective]:
        rows = PairRows.open(folder / "pairs")
        return untrained(), SupervisedPairs(rows, rows, batch_rows=4, seed=config.seed, validation_rows=4)

    (folder / name).mkdir()
    return Task(folder / name, config, assemble)


def publish(task: Task, text_from: Path) -> tuple[dict[str, Any], Path]:
    out = task.work / "out"
    out.mkdir()
    context = StageContext(
        name="finetune", work=task.work, out=out, run=NoTracker().run("k", "n"), progress=lambda progress: None,
        check_lease=lambda: None, store=ArtifactStore(task.work / "store"), home=task.work, acted={},
    )  # fmt: skip
    publication = Publication(
        "Tiny", "causal", text_from, eos_token_ids=(4, 0), pad_token_id=0, facts={"Data": "pairs"}
    )
    return write_model(publication, untrained(), task.config, context), out


def test_a_stopped_and_resumed_run_publishes_the_same_files(folder: Path) -> None:
    whole, parts = make_task(folder, "whole"), make_task(folder, "parts")
    run(whole, Ranks(), CPU)
    (parts.work / STOP).touch()
    run(parts, Ranks(), CPU)
    assert [line["step"] for line in read_metrics(parts.work / FILE)] == []
    clear_signals(parts.work)
    run(parts, Ranks(), CPU)
    text = Text.load(folder)
    samples = read_samples(whole.work / SAMPLES, text)
    assert [sample["step"] for sample in samples] == [4, 4, 8, 8]
    assert "double 0" in samples[0]["prompt"]
    assert samples == read_samples(parts.work / SAMPLES, text)
    (summary, out), (_, again) = publish(whole, folder), publish(parts, folder)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in again.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"} <= set(files)
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [0, 4]
    assert summary["precision"] in ("fp32", "bf16")
    assert summary["steps"] == 8
    assert summary["mfu"] > 0


def test_a_run_with_an_average_publishes_that(folder: Path) -> None:
    task = make_task(folder, "averaged", CONFIG.model_copy(update={"ema_decay": 0.9}))
    run(task, Ranks(), CPU)
    _, out = publish(task, folder)
    tensors = Checkpoints(task.work / CHECKPOINTS).load(CONFIG.steps).tensors
    published = AutoModelForCausalLM.from_pretrained(out).state_dict()["model.norm.weight"]
    assert torch.equal(published, tensors["average/model.norm.weight"])
    assert not torch.equal(published, tensors["model/model.norm.weight"])
    peak = json.loads((task.work / PEAK).read_bytes())["peak_memory_bytes"]
    assert 50e6 < peak < 50e9


def test_checkpoints_by_steps_are_in_the_artifact(folder: Path) -> None:
    task = make_task(folder, "kept", CONFIG.model_copy(update={"checkpoint_every_steps": 3}))
    run(task, Ranks(), CPU)
    _, out = publish(task, folder)
    assert sorted(path.name for path in (out / KEPT).iterdir()) == ["step-00000003", "step-00000006"]
    kept, last = (AutoModelForCausalLM.from_pretrained(place) for place in (out / KEPT / "step-00000003", out))
    tensors = Checkpoints(task.work / CHECKPOINTS).load(3).tensors
    assert torch.equal(kept.state_dict()["model.norm.weight"], tensors["model/model.norm.weight"])
    assert not torch.equal(kept.state_dict()["model.norm.weight"], last.state_dict()["model.norm.weight"])


def test_a_run_that_diverges_tells_the_driver(folder: Path) -> None:
    wild = OptimConfig(name="adamw", learning_rate=1e30, warmup_fraction=0.0)
    task = make_task(folder, "work", CONFIG.model_copy(update={"optim": wild}))
    run(task, Ranks(), CPU)
    failure = read_failure(task.work)
    assert isinstance(failure, StageError)
    assert "diverged in step 2: the " in str(failure)
    clear_signals(task.work)
    assert read_failure(task.work) is None


def test_bad_input_is_left_for_the_driver_and_not_tried_again(folder: Path) -> None:
    tried: list[int] = []

    def assemble() -> tuple[nn.Module, Objective]:
        tried.append(1)
        raise DataError("no rows", received=3, next_step="give some")

    task = Task(folder, CONFIG, assemble)
    with pytest.raises(DataError):
        run(task, Ranks(), CPU)
    run(task, Ranks(), CPU)
    assert len(tried) == 1
    assert str(read_failure(folder)) == "no rows; received 3; next: give some"


@pytest.mark.skipif(has_bf16(CPU), reason="this processor has bf16")
def test_bf16_that_is_not_there_is_refused(folder: Path) -> None:
    task = make_task(folder, "work", CONFIG.model_copy(update={"precision": "bf16"}))
    with pytest.raises(ConfigError, match=r"training\.precision"):
        run(task, Ranks(), CPU)
