"""A rank that neither dies nor goes on, and memory that runs out: what the driver is told."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn

from configs.errors import StageError
from configs.schema.model import ModelConfig
from configs.schema.training import TrainingConfig
from pipelines.training.metrics import FILE, read_metrics
from pipelines.training.models import build_model
from pipelines.training.objectives import LanguageObjective, Rows
from pipelines.training.parallel import Ranks
from pipelines.training.worker import Task, read_failure, run

CONFIG = TrainingConfig(steps=8, batch_rows=4, workers=2, eval_every_steps=8, log_every_steps=1, hang_seconds=3)
CPU = torch.device("cpu")


class Stopping(LanguageObjective):
    """Rank 1 stands still in the fourth step."""

    row_tokens = 16
    bytes_per_token = 2.0

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        if (step, rank) == (3, 1):
            os.kill(os.getpid(), signal.SIGSTOP)
        tokens = np.random.default_rng([step, rank]).integers(0, 8, (4 // world_size, 17))
        return Rows(torch.from_numpy(tokens), torch.ones((4 // world_size, 16), dtype=torch.bool))

    def validation(self) -> Mapping[str, Rows]:
        return {"": self.batch(0, 0, 1)}

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        return [""] * (4 // world_size)


def assemble() -> tuple[nn.Module, Stopping]:
    shape = ModelConfig(hidden_size=16, layers=1, heads=1, context_length=16)
    return build_model(shape, vocab_size=16, eos_token_id=0, seed=1), Stopping()


def one_rank(folder: Path, rank: int, sharding: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2,
        timeout=timedelta(seconds=CONFIG.hang_seconds),
    )  # fmt: skip
    run(Task(folder, CONFIG.model_copy(update={"sharding": sharding}), assemble), Ranks.current(), CPU)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_rank_that_stands_still_is_named_within_the_set_time(tmp_path: Path, sharding: str) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(tmp_path, rank, sharding)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        ranks[0].join(60)
        assert ranks[0].exitcode == 1
        assert ranks[1].is_alive()
    finally:
        for process in ranks:
            process.kill()
            process.join()
    lines = read_metrics(tmp_path / FILE)
    notices = [line["notice"] for line in lines if "notice" in line]
    assert len(notices) == 1
    assert f"rank 1 (process {ranks[1].pid} on " in notices[0]
    assert "did not come to the sum of step 4 within 3 s; all workers are replaced" in notices[0]
    assert "rank 0" not in notices[0]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3]
    assert read_failure(tmp_path) is None


def test_memory_that_runs_out_says_what_to_change(tmp_path: Path) -> None:
    class Greedy(Stopping):
        def loss(self, model: nn.Module, rows: Rows) -> torch.Tensor:
            return torch.empty(1 << 50).sum()

    config = CONFIG.model_copy(update={"workers": 1})
    with pytest.raises(RuntimeError, match="allocate"):
        run(Task(tmp_path, config, lambda: (assemble()[0], Greedy())), Ranks(), CPU)
    failure = read_failure(tmp_path)
    assert isinstance(failure, StageError)
    assert "ran out of memory" in failure.what
    assert "training.micro_batch_rows (now 8; the batch stays the same)" in str(failure.next_step)
