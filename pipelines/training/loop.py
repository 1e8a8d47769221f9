"""The training loop: one for every objective, in one process or many, without Ray and without a tracker.

It takes plain callables and owns the order of things: batch, forward and backward by micro-batches, one sum over the
ranks, clipping, optimizer, report, evaluation, checkpoint. Guarantees: the loss is normalised by target tokens over
all ranks and micro-batches; a run that stops anywhere and starts again gives the same weights, bit for bit, as one
that did not, on the same processor with the same number of ranks, threads and micro-batch rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.errors import CorruptArtifactError, StageError
from configs.schema.training import TrainingConfig
from pipelines.training.checkpoint import Checkpoint, Checkpoints, prefixed, without_prefix
from pipelines.training.hardware import Hardware
from pipelines.training.models import flops_per_token
from pipelines.training.objectives import Objective, Rows
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import GradientBuffer, Ranks
from pipelines.training.schedule import rate_factor

# What is summed over the ranks beside the gradients, by place: target tokens, positions run over (padding included),
# votes to stop, and from there on the loss of each row of the global batch.
_TARGETS, _POSITIONS, _STOP, _ROW_LOSSES = range(4)


@dataclass(frozen=True)
class Hooks:
    """How a run speaks to the world outside; only rank 0's `report` and `notice` are called."""

    report: Callable[[Mapping[str, float]], None]
    """Takes the figures of a step, `step` among them."""
    resumed: Callable[[int], None]
    """Called once, before the first step, with the number of steps that are already done."""
    notice: Callable[[str], None]
    """Takes one sentence that a person should see."""
    should_stop: Callable[[], bool]
    """Asked once a step on every rank; one True stops all of them after that step, with a checkpoint."""


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
        objective: Objective,
        config: TrainingConfig,
        *,
        hardware: Hardware,
        ranks: Ranks,
        checkpoints: Checkpoints,
        hooks: Hooks,
    ) -> None:
        self._model = model.to(hardware.device).train()
        self._objective = objective
        self._config = config
        self._hardware = hardware
        self._ranks = ranks
        self._checkpoints = checkpoints
        self._hooks = hooks
        self._optimizer = Optimizer(model, config.optim, dtype=hardware.dtype)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.buffer = GradientBuffer(self._parameters.values(), extra=_ROW_LOSSES + config.batch_rows)
        self._tokens_seen = 0

    def run(self) -> Outcome:
        """Trains from the newest checkpoint to the last step, or to where `should_stop` says.

        Raises:
            StageError: loss or gradient is no finite number.
            StorageError: a checkpoint cannot be written.
        """
        start = self._restore()
        if self._ranks.rank == 0:
            self._hooks.resumed(start)
        if start == self._config.steps:
            return Outcome(start, self._tokens_seen, finished=True)
        if self._hardware.compile:
            self._model.base_model.compile(dynamic=False)
        matmul_rate = self._hardware.matmul_rate(self._ranks)
        clock = _Clock(flops_per_token(self._model, self._objective.row_tokens), matmul_rate)
        saved_at = time.monotonic()
        for step in range(start, self._config.steps):
            figures, stop = self._step(step, clock)
            last = step + 1 == self._config.steps
            evaluates = last or (step + 1) % self._config.eval_every_steps == 0
            logs = evaluates or (step + 1) % self._config.log_every_steps == 0
            if logs:
                figures |= clock.read()
            if evaluates:
                figures |= self.evaluate()
            if logs:
                clock.restart()
            if self._ranks.rank == 0:
                if logs:
                    self._hooks.report({**figures, "time_ms": time.time_ns() // 1_000_000})
                if stop or last or time.monotonic() - saved_at >= self._config.checkpoint_every_seconds:
                    self._save(step + 1)
                    saved_at = time.monotonic()
            if stop:
                return Outcome(step + 1, self._tokens_seen, finished=last)
        return Outcome(self._config.steps, self._tokens_seen, finished=True)

    def accumulate(self, rows: Rows) -> None:
        """Adds gradients, token count and losses of this rank's `rows` to the buffer, a micro-batch at a time."""
        row_losses = self.buffer.extra[_ROW_LOSSES:]
        first = self._ranks.rank * len(rows)
        for begin in range(0, len(rows), self._config.micro_batch_rows):
            part = rows.part(begin, min(begin + self._config.micro_batch_rows, len(rows))).to(self._hardware.device)
            with self._hardware.autocast():
                loss = self._objective.loss(self._model, part)
            loss.backward()
            self.buffer.extra[_TARGETS] += part.targets.sum()
            self.buffer.extra[_POSITIONS] += part.targets.numel()
            row_losses[first + begin : first + begin + len(part)] = loss.detach() / len(part)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation loss in nats per token, of each source as well if there are several, and bits per byte.

        The rows are shared out over the ranks.
        """
        sources = self._objective.validation()
        totals = torch.zeros((len(sources), 2), dtype=torch.float64, device=self._hardware.device)
        size = self._config.micro_batch_rows
        self._model.eval()
        for total, rows in zip(totals, sources.values(), strict=True):
            for begin in range(size * self._ranks.rank, len(rows), size * self._ranks.world_size):
                part = rows.part(begin, min(begin + size, len(rows))).to(self._hardware.device)
                with self._hardware.autocast():
                    total[0] += self._objective.loss(self._model, part)
                total[1] += part.targets.sum()
        self._model.train()
        totals = self._ranks.sum(totals)
        loss, tokens = totals.sum(0).tolist()
        nats = loss / tokens
        figures = {"validation_loss": nats, "bits_per_byte": nats / math.log(2) / self._objective.bytes_per_token}
        if len(sources) > 1:
            means = (totals[:, 0] / totals[:, 1]).tolist()
            figures |= {f"validation_loss/{name}": mean for name, mean in zip(sources, means, strict=True)}
        return figures

    def _step(self, step: int, clock: _Clock) -> tuple[dict[str, float], bool]:
        waiting = time.perf_counter()
        rows = self._objective.batch(step, self._ranks.rank, self._ranks.world_size)
        clock.waited(time.perf_counter() - waiting)
        self.buffer.clear()
        self.accumulate(rows)
        self.buffer.extra[_STOP] += self._hooks.should_stop()
        self.buffer.sum(self._ranks)
        tokens, positions, stop = self.buffer.extra[:_ROW_LOSSES].tolist()
        row_losses = self.buffer.extra[_ROW_LOSSES:]
        gradients = self.buffer.gradients.div_(tokens)
        norm = torch.linalg.vector_norm(gradients)
        loss = float(row_losses.sum() / tokens)
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            raise self._diverged(step, row_losses)
        gradients.mul_((self._config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        factor = rate_factor(step, self._config.steps, self._config.optim)
        self._optimizer.step(factor, self._ranks)
        self._tokens_seen += int(tokens)
        clock.trained(int(positions))
        figures = {
            "step": step + 1,
            "tokens_seen": self._tokens_seen,
            "loss": loss,
            "lr": factor * self._config.optim.learning_rate,
            "grad_norm": float(norm),
        }
        return figures, bool(stop)

    def _diverged(self, step: int, row_losses: Tensor) -> StageError:
        bad = (~row_losses.isfinite()).nonzero().flatten().tolist()
        rows = f"rows {bad} of its batch" if bad else "no single row: the loss is finite, the gradient is not"
        return StageError(
            f"training diverged in step {step + 1}: loss or gradient is no finite number; {rows}",
            next_step="lower training.optim.learning_rate (or muon_learning_rate); the last checkpoint stands",
        )

    def _restore(self) -> int:
        """Loads the newest checkpoint on every rank; the number of steps done."""
        found = None
        if self._ranks.rank == 0:
            found = self._checkpoints.newest(self._notice_damage)
        step = self._ranks.from_first(found.step if found else 0, self._hardware.device)
        if step == 0:
            return 0
        checkpoint = found or self._checkpoints.load(step)
        with torch.no_grad():
            for name, value in without_prefix("model", checkpoint.tensors).items():
                self._parameters[name].copy_(value)
        self._optimizer.load_state(without_prefix("optimizer", checkpoint.tensors))
        self._tokens_seen = checkpoint.tokens_seen
        return step

    def _notice_damage(self, error: CorruptArtifactError) -> None:
        self._hooks.notice(str(error))

    def _save(self, step: int) -> None:
        tensors = prefixed("model", self._parameters) | prefixed("optimizer", self._optimizer.state())
        self._checkpoints.save(Checkpoint(step, self._tokens_seen, tensors))


class _Clock:
    """Speeds of the steps since the last restart; evaluation is not in them."""

    def __init__(self, flops_per_token: float, matmul_rate: float) -> None:
        self._flops_per_token = flops_per_token
        self._matmul_rate = matmul_rate
        self.restart()

    def restart(self) -> None:
        """Begins a new interval."""
        self._tokens = 0
        self._waiting = 0.0
        self._since = time.perf_counter()

    def trained(self, tokens: int) -> None:
        """Counts positions that all ranks ran over."""
        self._tokens += tokens

    def waited(self, seconds: float) -> None:
        """Counts time spent on getting data."""
        self._waiting += seconds

    def read(self) -> dict[str, float]:
        """Positions a second, share of the measured matmul rate, share of time spent on data, since `restart`."""
        seconds = time.perf_counter() - self._since
        rate = self._tokens / seconds
        return {
            "tokens_per_second": rate,
            "mfu": rate * self._flops_per_token / self._matmul_rate,
            "data_wait_fraction": self._waiting / seconds,
        }
