"""Real processes over gloo that train a tiny model on seeded noise, and what they leave behind.

They come from a fork server, as a forked copy of a process that has hashed a file cannot hash another.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from configs.schema.model import Architecture, ModelConfig
from configs.schema.training import LoraConfig, TrainingConfig
from pipelines.training.adapters import Adapters
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.hardware import Hardware
from pipelines.training.loop import Hooks, Trainer
from pipelines.training.metrics import FILE, MetricsFile, read_metrics
from pipelines.training.models import LANGUAGE_HEADS, build_model
from pipelines.training.objectives import LanguageObjective, Rows
from pipelines.training.parallel import Ranks

_STORES = itertools.count()


class Tokens(LanguageObjective):
    """Rows of noise for a model of any family, some targets left out; a process ends itself in `(step, rank)`."""

    row_tokens = 16
    bytes_per_token = 2.0

    def __init__(self, killed_in: tuple[int, int] | None) -> None:
        self._killed_in = killed_in

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        if (step, rank) == self._killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        share = 4 // world_size
        return self._make(step, 4).part(rank * share, (rank + 1) * share)

    def validation(self) -> Mapping[str, Rows]:
        return {"": self._make(1_000_000, 5)}

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        return ["noise"] * (4 // world_size)

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        if not model.config.is_encoder_decoder and model.config.model_type != "bert":
            return super().loss(model, rows)
        tokens, following = rows.tokens[:, :-1], rows.tokens[:, 1:]
        written = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        logits = model(input_ids=tokens, **written).logits
        return F.cross_entropy(logits[rows.targets], following[rows.targets], reduction="sum")

    def measure(self, model: nn.Module, rows: Rows) -> Tensor:
        return torch.stack([self.loss(model, rows).double(), rows.target_count.double()])

    def _make(self, seed: int, count: int) -> Rows:
        random = np.random.default_rng(seed)
        tokens = torch.from_numpy(random.integers(0, 8, (count, self.row_tokens + 1)))
        return Rows(tokens, torch.from_numpy(random.random((count, self.row_tokens)) < 0.7))


@dataclass(frozen=True)
class Run:
    """A training run that any number of processes may take part in."""

    config: TrainingConfig
    architecture: Architecture = "llama"
    lora: bool = False
    stop_after: int | None = None
    """Steps that this attempt takes."""
    killed_in: tuple[int, int] | None = None
    """Step and rank that ends by `kill -9`."""

    def model(self) -> nn.Module:
        """A vocabulary of 65 does not divide by two; T5 ties input and output embeddings."""
        shape = ModelConfig(
            architecture=self.architecture, hidden_size=32, layers=2, heads=2, context_length=32, dropout=0.1
        )
        model = build_model(shape, vocab_size=65, eos_token_id=0, seed=3)
        if self.lora:
            Adapters.attach(model, LoraConfig(rank=2), head=LANGUAGE_HEADS[shape.family], seed=1)
        return model

    def train(self, folder: Path, ranks: Ranks) -> nn.Module:
        """Trains as one of `ranks` from the newest checkpoint in `folder`."""
        metrics = MetricsFile(folder / FILE)
        asked = iter(range(1, 1_000_000))
        hooks = Hooks(
            report=metrics.append, resumed=metrics.resumed, notice=lambda text: metrics.append({"notice": text}),
            arrived=lambda step: None, should_stop=lambda: next(asked) == self.stop_after,
        )  # fmt: skip
        model = self.model()
        hardware = Hardware(torch.device("cpu"), "fp32", compile=False)
        trainer = Trainer(
            model, Tokens(self.killed_in), self.config,
            hardware=hardware, ranks=ranks, checkpoints=Checkpoints(folder), hooks=hooks,
        )  # fmt: skip
        trainer.run()
        metrics.close()
        return model

    def alone(self, folder: Path) -> nn.Module:
        """In this process."""
        folder.mkdir(parents=True, exist_ok=True)
        return self.train(folder, Ranks())

    def on_two(self, folder: Path) -> list[int | None]:
        """In two new processes; their exit codes."""
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipelines.training.loop"])
        store = folder / f"store-{next(_STORES)}"
        ranks = [context.Process(target=_take_part, args=(self, folder, store, rank)) for rank in range(2)]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(60)
            return [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _take_part(run: Run, folder: Path, store: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    run.train(folder, Ranks.current())
    distributed.destroy_process_group()


def figures(folder: Path, name: str) -> list[float]:
    """One figure of all steps that have it."""
    return [line[name] for line in read_metrics(folder / FILE) if name in line]
