"""The training loop: one for every objective, in one process or many, without Ray and without a tracker.

It takes plain callables and owns the order of things: batch, forward and backward by micro-batches, one sum over the
ranks, clipping, optimizer, report, evaluation, checkpoint. Guarantees: the loss is normalised by target tokens over
all ranks and micro-batches; a run that stops anywhere and starts again gives the same weights, bit for bit, as one
that did not, on the same processor with the same number of ranks, threads and micro-batch rows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import CorruptArtifactError, StageError
from configs.schema.training import TrainingConfig
from pipelines.training.averaging import WeightAverage
from pipelines.training.checkpoint import Checkpoint, Checkpoints, without_prefix
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.guard import LossGuard
from pipelines.training.hardware import Hardware
from pipelines.training.models import recompute_activations, training_flops
from pipelines.training.objectives import Batch, Objective
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import GradientBuffer, Ranks
from pipelines.training.samples import continuations
from pipelines.training.schedule import rate_factor
from pipelines.training.sharding import Program, collect_gradients, drop_gathered, held_weights, shard

# What is summed over the ranks beside the gradients, by place: target tokens, positions run over (padding included),
# votes to stop, the first rank's vote to save, and from there on the loss of each row of the global batch.
_TARGETS, _POSITIONS, _STOP, _SAVE, _ROW_LOSSES = range(5)
AVERAGE = "average"
"""What the averaged weights are called in a checkpoint."""


@dataclass(frozen=True)
class Hooks:
    """How a run speaks to the world outside; `report`, `resumed` and `wrote` are called on rank 0 alone."""

    report: Callable[[Mapping[str, float]], None]
    """Takes the figures of a step, `step` among them."""
    resumed: Callable[[int], None]
    """Called once, before the first step, with the number of steps that are already done."""
    notice: Callable[[str], None]
    """Takes one sentence that a person should see."""
    arrived: Callable[[int], None]
    """Called on every rank with the number of a step (from 1) before it first waits for the others in it."""
    should_stop: Callable[[], bool]
    """Asked once a step on every rank; one True stops all of them after that step, with a checkpoint."""
    wrote: Callable[[int, Sequence[Sequence[int]], Sequence[Sequence[int]]], None] = lambda step, prompts, written: None
    """Takes, after the evaluation of a step, prompts and what the model wrote behind them, as token ids."""


@dataclass(frozen=True)
class Outcome:
    """Where a run ended."""

    step: int
    tokens_seen: int
    finished: bool


class Trainer:
    """The state of one training run on one rank."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective[Any],
        config: TrainingConfig,
        *,
        hardware: Hardware,
        ranks: Ranks,
        checkpoints: Checkpoints,
        hooks: Hooks,
    ) -> None:
        self._model = model.train()
        if config.activation_checkpointing:
            recompute_activations(model)
        self._program = Program(model)
        self._sharded = config.sharding == "full" and ranks.world_size > 1
        if self._sharded:
            shard(self._program, hardware, ranks)
        else:
            model.to(hardware.device)
        self._objective = objective
        self._config = config
        self._hardware = hardware
        self._ranks = ranks
        self._checkpoints = checkpoints
        hang_time = timedelta(seconds=config.hang_seconds)
        self._writer = CheckpointWriter(checkpoints, ranks.apart(hang_time) if self._sharded else Ranks())
        self._hooks = hooks
        self._parameters = held_weights(model)
        self._optimizer = Optimizer(
            model, self._parameters, config.optim, dtype=hardware.dtype, sharded=self._sharded
        )  # fmt: skip
        extra = _ROW_LOSSES + config.batch_rows
        self.buffer = GradientBuffer(self._parameters.values(), extra, sharded=self._sharded)
        collect_gradients(model, self._parameters)
        self._guard = LossGuard(config.spike_nats)
        self._average = None if config.ema_decay is None else WeightAverage(self._parameters, config.ema_decay)
        self._tokens_seen = 0
        self._saved_at = 0.0

    def run(self) -> Outcome:
        """Trains from the newest checkpoint to the last step, or to where `should_stop` says.

        Checkpoints are written while training goes on; whatever ends the run, none is being written when it returns.

        Raises:
            StageError: loss or gradient is no finite number, or the loss leaps up; the weights are those before it.
            StorageError: a checkpoint could not be written; told in the step after, or at the end.
        """
        with self._writer.finishing(self._hooks.notice):
            return self._train()

    def _train(self) -> Outcome:
        start = self._restore()
        if self._ranks.rank == 0:
            self._hooks.resumed(start)
        if start == self._config.steps:
            return Outcome(start, self._tokens_seen, finished=True)
        if self._hardware.compile:
            self._model.base_model.compile(dynamic=False)
        matmul_rate = self._hardware.matmul_rate(self._ranks)
        clock = _Clock(training_flops(self._model, self._objective.row_tokens), matmul_rate)
        self._saved_at = time.monotonic()
        for step in range(start, self._config.steps):
            self._writer.check()
            figures, stop, save = self._step(step, clock)
            last = step + 1 == self._config.steps
            evaluates = last or (step + 1) % self._config.eval_every_steps == 0
            logs = evaluates or (step + 1) % self._config.log_every_steps == 0
            if logs:
                figures |= clock.read()
            if evaluates:
                with self._average.in_place() if self._average else contextlib.nullcontext():
                    figures |= self.evaluate()
                    self._write(step + 1)
            if logs:
                clock.restart()
            if logs and self._ranks.rank == 0:
                self._hooks.report({**figures, "time_ms": time.time_ns() // 1_000_000})
            if stop or last or save or self._checkpoints.is_kept(step + 1):
                saving = time.perf_counter()
                self._save(step + 1)
                clock.stalled(time.perf_counter() - saving)
            if stop:
                return Outcome(step + 1, self._tokens_seen, finished=last)
        return Outcome(self._config.steps, self._tokens_seen, finished=True)

    def accumulate(self, rows: Batch, step: int = 0) -> None:
        """Adds gradients, target count and losses of this rank's `rows` to the buffer, a micro-batch at a time.

        What dropout leaves out is drawn anew for each micro-batch, from (seed, `step`, its first row).
        """
        row_losses = self.buffer.extra[_ROW_LOSSES:]
        first = self._ranks.rank * len(rows)
        for begin in range(0, len(rows), self._config.micro_batch_rows):
            part = rows.part(begin, min(begin + self._config.micro_batch_rows, len(rows))).to(self._hardware.device)
            torch.manual_seed(_mixed(self._config.seed, step, first + begin))
            with self._hardware.autocast():
                loss = self._program(self._objective.loss, part)
            loss.backward()
            self.buffer.extra[_TARGETS] += part.target_count
            self.buffer.extra[_POSITIONS] += part.positions
            row_losses[first + begin : first + begin + len(part)] = loss.detach() / len(part)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective's figures over the validation rows, which are shared out over the ranks.

        With several sources, the validation loss of each as well, in nats per target.
        """
        sources = self._objective.validation()
        rank, world_size = self._ranks.rank, self._ranks.world_size
        sums = torch.zeros((len(sources), self._objective.tallies), dtype=torch.float64, device=self._hardware.device)
        size = self._config.micro_batch_rows
        self._model.eval()
        for total, rows in zip(sums, sources.values(), strict=True):
            for first in range(0, len(rows), size * world_size):
                counts = first + size * rank < len(rows)
                if not counts and not self._sharded:
                    break
                # Ranks that share a model run it together: one without rows of its own repeats another's.
                begin = first + size * rank if counts else first
                part = rows.part(begin, min(begin + size, len(rows))).to(self._hardware.device)
                with self._hardware.autocast():
                    measured = self._program(self._objective.measure, part)
                if counts:
                    total += measured
        self._model.train()
        drop_gathered(self._program)
        sums = self._ranks.sum(sums)
        figures: dict[str, float] = self._objective.figures(sums.sum(0).tolist())
        if len(sources) > 1:
            means = (sums[:, 0] / sums[:, 1]).tolist()
            figures |= {f"validation_loss/{name}": mean for name, mean in zip(sources, means, strict=True)}
        return figures

    def _write(self, step: int) -> None:
        """Has the model go on with the objective's prompts."""
        if self._ranks.rank > 0 or self._sharded:
            return
        prompts = self._objective.prompts()
        self._model.eval()
        with self._hardware.autocast():
            written = continuations(self._model, prompts)
        self._model.train()
        self._hooks.wrote(step, prompts, written)

    def _step(self, step: int, clock: _Clock) -> tuple[dict[str, float], bool, bool]:
        """One step: its figures, whether to stop, whether a checkpoint is due."""
        waiting = time.perf_counter()
        rows = self._objective.batch(step, self._ranks.rank, self._ranks.world_size)
        clock.waited(time.perf_counter() - waiting)
        self.buffer.clear()
        if self._sharded:
            self._hooks.arrived(step + 1)
        self.accumulate(rows, step)
        self.buffer.extra[_STOP] += self._hooks.should_stop()
        self.buffer.extra[_SAVE] += self._ranks.rank == 0 and self._is_due()
        if not self._sharded:
            self._hooks.arrived(step + 1)
        self.buffer.sum(self._ranks)
        tokens, positions, stop, save = self.buffer.extra[:_ROW_LOSSES].tolist()
        row_losses = self.buffer.extra[_ROW_LOSSES:]
        gradients = self.buffer.gradients.div_(tokens)
        norm = self.buffer.norm(self._ranks)
        loss = float(row_losses.sum() / tokens)
        problem = self._guard.check(loss, float(norm))
        if problem is not None:
            raise self._diverged(step, problem, row_losses)
        gradients.mul_((self._config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        factor = rate_factor(step, self._config.steps, self._config.optim)
        self._optimizer.step(factor, self._ranks)
        if self._average:
            self._average.follow(step + 1)
        self._tokens_seen += int(tokens)
        clock.trained(int(positions), int(tokens))
        figures = {
            "step": step + 1,
            "tokens_seen": self._tokens_seen,
            "loss": loss,
            "lr": factor * self._config.optim.learning_rate,
            "grad_norm": float(norm),
        }
        return figures, bool(stop), bool(save)

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._config.checkpoint_every_seconds

    def _diverged(self, step: int, problem: str, row_losses: Tensor) -> StageError:
        """The error that ends the run, with the rows that are no number, or else those whose loss is the highest."""
        rows = (~row_losses.isfinite()).nonzero().flatten().tolist()
        if not rows:
            rows = (row_losses == row_losses.max()).nonzero().flatten().tolist()
        world_size = self._ranks.world_size
        names = [name for rank in range(world_size) for name in self._objective.samples(step, rank, world_size)]
        return StageError(
            f"training diverged in step {step + 1}: {problem}; the micro-batch to look at is rows {rows} of the batch: "
            + ", ".join(names[row] for row in rows),
            next_step="lower training.optim.learning_rate (or muon_learning_rate), or look at these samples; the last "
            "checkpoint stands",
        )

    def _restore(self) -> int:
        """Loads the newest checkpoint on every rank; the number of steps done."""
        newest = self._checkpoints.newest(self._notice_damage) if self._ranks.rank == 0 else None
        step = self._ranks.from_first(newest or 0, self._hardware.device)
        if step == 0:
            return 0
        checkpoint = self._checkpoints.load(step, self._ranks if self._sharded else Ranks())
        with torch.no_grad():
            for name, value in without_prefix("model", checkpoint.tensors).items():
                self._parameters[name].copy_(value)
        kinds = {kind: without_prefix(kind, checkpoint.tensors) for kind in self._optimizer.state()}
        self._optimizer.load_state(kinds, step)
        self._guard.load_state(checkpoint.recent_losses)
        if self._average:
            self._average.load_state(without_prefix(AVERAGE, checkpoint.tensors))
        self._tokens_seen = checkpoint.tokens_seen
        return step

    def _notice_damage(self, error: CorruptArtifactError) -> None:
        self._hooks.notice(str(error))

    def _save(self, step: int) -> None:
        """Has what the first rank holds written, or in a sharded run what every rank does."""
        self._saved_at = time.monotonic()
        if not self._sharded and self._ranks.rank > 0:
            return
        states = {"model": self._parameters, **self._optimizer.state()}
        if self._average:
            states[AVERAGE] = self._average.state()
        whole = {name: tuple(parameter.shape) for name, parameter in self._model.named_parameters()}
        self._writer.save(
            Checkpoint(
                step,
                self._tokens_seen,
                {f"{kind}/{name}": tensor for kind, state in states.items() for name, tensor in state.items()},
                self._guard.state(),
                {f"{kind}/{name}": whole[name] for kind, state in states.items() for name in state},
            )
        )


def _mixed(*numbers: int) -> int:
    """A seed that all of `numbers` decide."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Clock:
    """Speeds of the steps since the last restart; evaluation is not in them."""

    def __init__(self, flops: tuple[float, float], matmul_rate: float) -> None:
        self._per_position, self._per_target = flops
        self._matmul_rate = matmul_rate
        self.restart()

    def restart(self) -> None:
        """Begins a new interval."""
        self._positions = 0
        self._targets = 0
        self._waiting = 0.0
        self._stall = 0.0
        self._since = time.perf_counter()

    def trained(self, positions: int, targets: int) -> None:
        """Counts positions that all ranks ran over, and targets among them."""
        self._positions += positions
        self._targets += targets

    def waited(self, seconds: float) -> None:
        """Counts time spent on getting data."""
        self._waiting += seconds

    def stalled(self, seconds: float) -> None:
        """Counts time spent on a checkpoint by the training thread."""
        self._stall += seconds

    def read(self) -> dict[str, float]:
        """Positions a second, share of the measured matmul rate, share of time spent on data, seconds that checkpoints
        held training up, since `restart`."""
        seconds = time.perf_counter() - self._since
        flops = self._positions * self._per_position + self._targets * self._per_target
        return {
            "tokens_per_second": self._positions / seconds,
            "mfu": flops / seconds / self._matmul_rate,
            "data_wait_fraction": self._waiting / seconds,
            "checkpoint_stall_seconds": self._stall,
        }
