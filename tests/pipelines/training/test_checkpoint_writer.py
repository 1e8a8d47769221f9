"""Checkpoints that are written while training goes on: what they hold, what a kill, an error or a slow disk does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from ranks_world import Tokens
from torch import nn

from configs.errors import StageError, StorageError
from configs.schema.model import ModelConfig
from configs.schema.training import TrainingConfig
from pipelines.training.checkpoint import Checkpoint, Checkpoints
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.hardware import Hardware
from pipelines.training.loop import Hooks, Trainer
from pipelines.training.models import build_model
from pipelines.training.objectives import Rows
from pipelines.training.parallel import Ranks

CONFIG = TrainingConfig(
    steps=6, batch_rows=4, micro_batch_rows=4, eval_every_steps=6, log_every_steps=1, workers=1,
    checkpoint_every_seconds=1e-9,
)  # fmt: skip
SHAPE = ModelConfig(hidden_size=32, layers=1, heads=2, context_length=32)
KILLED = CONFIG.model_copy(update={"steps": 8})


class SlowDisk(Checkpoints):
    """Writes take 0.25 s longer."""

    def save(self, checkpoint: Checkpoint, ranks: Ranks = Ranks()) -> None:  # noqa: B008 - frozen
        time.sleep(0.25)
        super().save(checkpoint, ranks)


def trainer(
    checkpoints: Checkpoints,
    config: TrainingConfig = CONFIG,
    *,
    vocab_size: int = 65,
    objective: Tokens | None = None,
    lines: list[Mapping[str, float]] | None = None,
    notices: list[str] | None = None,
) -> Trainer:
    hooks = Hooks(
        report=(lines if lines is not None else []).append,
        resumed=lambda step: None,
        arrived=lambda step: None,
        notice=(notices if notices is not None else []).append,
        should_stop=lambda: False,
    )
    return Trainer(
        build_model(SHAPE, vocab_size=vocab_size, eos_token_id=0, seed=3),
        objective or Tokens(None),
        config,
        hardware=Hardware(torch.device("cpu"), "fp32", compile=False),
        ranks=Ranks(),
        checkpoints=checkpoints,
        hooks=hooks,
    )


def no_disk(folder: Path) -> Path:
    """A folder that cannot be made."""
    (folder / "file").write_text("")
    return folder / "file" / "checkpoints"


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    disk = SlowDisk(tmp_path)
    writer = CheckpointWriter(disk, Ranks())
    weight = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    with writer.finishing(pytest.fail):
        writer.save(Checkpoint(1, 10, {"model/weight": weight}))
        with torch.no_grad():
            weight.mul_(-1)
        writer.check()
        assert disk.steps() == []
    assert torch.equal(disk.load(1).tensors["model/weight"], -weight)


def test_a_save_that_comes_too_soon_waits_and_the_figures_say_how_long(tmp_path: Path) -> None:
    disk = SlowDisk(tmp_path)
    lines: list[Mapping[str, float]] = []
    trainer(disk, lines=lines).run()
    assert disk.steps() == [6, 5]
    # A line is reported before its own step is saved, and the first save has none to wait for.
    nothing, first, *others = [line["checkpoint_stall_seconds"] for line in lines]
    assert nothing == 0.0
    assert first < 0.15
    assert all(0.15 < stall < 5 for stall in others)


def test_a_disk_that_fails_stops_the_run_within_two_steps(tmp_path: Path) -> None:
    lines: list[Mapping[str, float]] = []
    notices: list[str] = []
    with pytest.raises(StorageError, match=r"cannot write checkpoint .*step-00000001: .*training resumes"):
        trainer(Checkpoints(no_disk(tmp_path)), lines=lines, notices=notices).run()
    assert 1 <= len(lines) <= 2
    assert notices == []


def test_a_write_that_failed_is_told_without_another_save(tmp_path: Path) -> None:
    writer = CheckpointWriter(Checkpoints(no_disk(tmp_path)), Ranks())

    def ask_for_a_while() -> None:
        writer.save(Checkpoint(1, 10, {"a": torch.zeros(1)}))
        for _ in range(1000):
            writer.check()
            time.sleep(0.01)
        pytest.fail("never told")

    with pytest.raises(StorageError, match="step-00000001"), writer.finishing(pytest.fail):
        ask_for_a_while()


def test_a_disk_that_fails_in_the_last_step_fails_the_run(tmp_path: Path) -> None:
    lines: list[Mapping[str, float]] = []
    with pytest.raises(StorageError, match="step-00000006"):
        trainer(
            Checkpoints(no_disk(tmp_path)), CONFIG.model_copy(update={"checkpoint_every_seconds": 1e9}), lines=lines
        ).run()
    assert len(lines) == 6


class Diverging(Tokens):
    """The loss of the third step is no number; by then the folder of the checkpoints may have become a file."""

    def __init__(self, broken: Path | None) -> None:
        super().__init__(None)
        self._broken = broken

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        self._step = step
        if step == 2 and self._broken is not None:
            shutil.rmtree(self._broken)
            self._broken.write_text("")
        return super().batch(step, rank, world_size)

    def loss(self, model: nn.Module, rows: Rows) -> torch.Tensor:
        return super().loss(model, rows) * (float("nan") if self._step == 2 else 1.0)


def test_a_run_that_diverges_ends_when_the_checkpoint_under_way_is_whole(tmp_path: Path) -> None:
    disk = SlowDisk(tmp_path)
    notices: list[str] = []
    with pytest.raises(StageError, match="diverged in step 3"):
        trainer(disk, objective=Diverging(None), notices=notices).run()
    assert disk.steps() == [2, 1]
    assert notices == []


def test_a_run_that_diverges_says_so_and_that_its_last_checkpoint_failed(tmp_path: Path) -> None:
    disk = SlowDisk(tmp_path / "checkpoints")
    notices: list[str] = []
    with pytest.raises(StageError, match="diverged in step 3"):
        trainer(disk, objective=Diverging(tmp_path / "checkpoints"), notices=notices).run()
    assert len(notices) == 1
    assert "the last checkpoint was not written (cannot write checkpoint" in notices[0]


def train_to_the_end(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer(Checkpoints(folder), KILLED, vocab_size=10_000).run()


def in_a_process(folder: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.training.loop"])
    process = context.Process(target=train_to_the_end, args=(folder,))
    process.start()
    return process


def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = in_a_process(killed)
    assert process.pid
    while not (half := stopped_while_writing(process.pid, killed)):
        assert process.is_alive()
    process.kill()
    process.join()
    assert half.exists()
    checkpoints = Checkpoints(killed)
    step = int(half.name.split(".")[1].removeprefix("step-"))
    assert checkpoints.newest(lambda error: pytest.fail(str(error))) == step - 1
    for folder in (killed, whole):
        again = in_a_process(folder)
        again.join(60)
        assert again.exitcode == 0
    assert not half.exists()
    one, other = (Checkpoints(folder).load(8).tensors for folder in (killed, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stopped_while_writing(process: int, folder: Path) -> Path | None:
    """Halts `process` at a moment when a checkpoint stands and another is half written, and gives the latter's folder;
    lets it go on if the moment is gone."""
    if not any(folder.glob("step-*")):
        return None
    for aside in folder.glob(".step-*"):
        os.kill(process, signal.SIGSTOP)
        if aside.exists() and not (aside / "state.json").exists():
            return aside
        os.kill(process, signal.SIGCONT)
    return None
