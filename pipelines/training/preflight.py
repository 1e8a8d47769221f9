"""What a run will need, told before any worker starts: sizes, arithmetic, memory, speed, time and cost.

`plan` is a pure function of typed facts, `check` refuses what cannot fit. `trial` gets the facts that only the machine
knows, from one micro-batch of the run itself. Where that cannot be done (a GPU that the driver does not have, a model
whose micro-batch would take too long) speed and activations are left out of the plan, which says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.schema.training import TrainingConfig
from pipelines.training.hardware import Hardware
from pipelines.training.models import (
    hidden_matrices,
    parameter_count,
    recompute_activations,
    trained_count,
    training_flops,
)
from pipelines.training.objectives import Batch, Objective
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import Ranks
from pipelines.training.sharding import held_weights, sharded_layers

TOKENS_PER_PARAMETER = 20
"""Training tokens a parameter at which a given amount of arithmetic is best spent (Hoffmann et al. 2022, "Training
Compute-Optimal Large Language Models", table 3)."""
_PROCESS_BYTES = 640_000_000
"""A worker without a model: interpreter, torch, transformers, Ray. Measured: 669 MB with one of 34 MB."""
_TRIAL_FLOPS = 2e11
"""Longest trial: about 10 s on a slow core."""
_TRIAL_BATCHES = 4
_STATE_NUMBERS = {"adamw": 2, "muon": 1}
"""Numbers that an optimizer keeps for each weight it changes; of Muon, for its matrices."""


@dataclass(frozen=True)
class Trial:
    """What one micro-batch took, forward and backward, and one update, in one worker."""

    seconds_per_position: float
    row_positions: float
    """Length of a row in the first batches, on average."""
    activation_bytes: int
    """Kept for the backward pass at the end of the forward pass."""
    optimizer_seconds: float
    """One update by one process; Muon's is shared out over the workers."""


@dataclass(frozen=True)
class Facts:
    """What is known before a run."""

    parameters: int
    trained: int
    """Parameters that training changes."""
    trained_by_muon: int
    gathered: int
    """Parameters that a worker of a sharded run has whole at once: those outside the layers, and the largest layer."""
    flops_per_position: float
    """As if each were predicted."""
    row_positions: int
    """Longest row."""
    memory_bytes: int | None
    """Free for all workers of one machine; None if the driver cannot know."""
    workers_on_machine: int
    trial: Trial | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    parameters: int
    trained_parameters: int
    positions: int
    """Over the whole run, padding included."""
    flops: float
    worker_bytes: int
    """Peak memory of a worker."""
    tokens_per_second: float | None
    """Of all workers together."""
    seconds: float | None
    """Of the steps; evaluation and checkpoints come on top."""
    cost: float | None
    compute_optimal_tokens: int

    def describe(self) -> str:
        """One line for people."""
        trained = "" if self.trained_parameters == self.parameters else f" ({self.trained_parameters:,} trained)"
        parts = [
            f"{self.parameters:,} parameters{trained}",
            f"{self.positions:,} tokens",
            f"{self.flops:.2g} FLOP",
            f"about {self.worker_bytes / 1e9:.2f} GB a worker",
        ]
        if self.tokens_per_second is None or self.seconds is None:
            parts.append("speed unknown before the run")
        else:
            parts.append(f"about {self.tokens_per_second:,.0f} tokens/s, {self.seconds / 60:.1f} min")
        if self.cost is not None:
            parts.append(f"cost {self.cost:.2f}")
        share = self.positions / self.compute_optimal_tokens
        parts.append(f"{share:.2g} of the compute-optimal {self.compute_optimal_tokens:,} tokens")
        return ", ".join(parts)


def plan(facts: Facts, config: TrainingConfig) -> Plan:
    """What a run with `facts` and `config` needs.

    A worker holds weights, gradients, the optimizer's numbers, an average if there is one, the activations of a
    micro-batch, and, in the machine's memory, a copy of weights and numbers that checkpoints are written from. In a
    sharded run it holds its part of these, and whole what it has gathered and the gradients of that; on a processor it
    builds the whole model first.
    """
    numbers = _STATE_NUMBERS["adamw"] * (facts.trained - facts.trained_by_muon)
    numbers += _STATE_NUMBERS["muon"] * facts.trained_by_muon
    numbers += 0 if config.ema_decay is None else facts.trained
    updates = 2 * facts.trained_by_muon  # the directions before and after orthogonalisation
    kept = facts.parameters + facts.trained + numbers + updates
    kept += 0 if config.use_gpu else facts.trained + numbers
    if config.sharding == "full" and config.fewest_workers > 1:
        kept = -(-kept // config.fewest_workers) + 2 * facts.gathered
        kept = kept if config.use_gpu else max(kept, facts.parameters)
    activations = facts.trial.activation_bytes if facts.trial else 0
    row = facts.trial.row_positions if facts.trial else facts.row_positions
    batch = config.batch_rows * row
    positions = round(config.steps * batch)
    seconds = rate = None
    if facts.trial:
        step = batch * facts.trial.seconds_per_position / config.most_workers + facts.trial.optimizer_seconds
        seconds, rate = config.steps * step, batch / step
    price = config.price_per_hour
    return Plan(
        parameters=facts.parameters,
        trained_parameters=facts.trained,
        positions=positions,
        flops=positions * facts.flops_per_position,
        worker_bytes=_PROCESS_BYTES + 4 * kept + activations,
        tokens_per_second=rate,
        seconds=seconds,
        cost=None if price is None or seconds is None else price * seconds / 3600,
        compute_optimal_tokens=TOKENS_PER_PARAMETER * facts.parameters,
    )


def check(planned: Plan, facts: Facts, config: TrainingConfig) -> None:
    """Raises `ConfigError` if the workers of a machine need more memory than it has free."""
    needed = facts.workers_on_machine * planned.worker_bytes
    if facts.memory_bytes is None or needed <= facts.memory_bytes:
        return
    raise ConfigError(
        f"training does not fit into memory: a model of {planned.parameters:,} parameters, "
        f"{planned.trained_parameters:,} of them trained with {config.optim.name}",
        received=f"{facts.workers_on_machine} workers x {planned.worker_bytes / 1e9:.2f} GB "
        f"= {needed / 1e9:.2f} GB on one machine",
        allowed=f"{facts.memory_bytes / 1e9:.2f} GB, which are free",
        next_step=f"lower training.micro_batch_rows (now {config.micro_batch_rows}), training.workers "
        f"(now {config.workers}) or the model's size, set training.sharding=full, or train adapters (lora)",
    )


def can_try(facts: Facts) -> bool:
    """Whether a trial of one row is short enough."""
    return facts.flops_per_position * facts.row_positions <= _TRIAL_FLOPS


def trial(
    assemble: Callable[[], tuple[nn.Module, Objective[Any]]], config: TrainingConfig, hardware: Hardware
) -> Trial:
    """Runs a micro-batch of the first steps, and an update, twice with the threads of one worker; times the second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.cpus_per_worker)
    try:
        model, objective = assemble()
        model.to(hardware.device).train()
        if config.activation_checkpointing:
            recompute_activations(model)
        parts = list(_first_parts(objective, config))
        part = max(parts, key=lambda rows: rows.positions).to(hardware.device)
        kept: dict[int, int] = {}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        def once() -> float:
            started = time.perf_counter()
            with hardware.autocast():
                loss = objective.loss(model, part)
            loss.backward()
            float(loss.detach())
            return time.perf_counter() - started

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            once()
        seconds = once()
        optimizer = Optimizer(model, held_weights(model), config.optim, dtype=hardware.dtype)
        optimizer.step(1.0, Ranks())  # the first one allocates
        started = time.perf_counter()
        optimizer.step(1.0, Ranks())
        return Trial(
            seconds_per_position=seconds / part.positions,
            row_positions=sum(rows.positions for rows in parts) / sum(map(len, parts)),
            activation_bytes=sum(kept.values()),
            optimizer_seconds=time.perf_counter() - started,
        )
    finally:
        torch.set_num_threads(threads)


def survey(
    skeleton: nn.Module,
    row_positions: int,
    config: TrainingConfig,
    *,
    memory_bytes: int | None,
    workers_on_machine: int,
) -> Facts:
    """The facts that a model tells which has no memory for its weights."""
    matrices = hidden_matrices(skeleton) if config.optim.name == "muon" else {}
    layers = [parameter_count(layer) for layer in sharded_layers(skeleton)]
    return Facts(
        parameters=parameter_count(skeleton),
        trained=trained_count(skeleton),
        trained_by_muon=sum(matrix.numel() for matrix in matrices.values()),
        gathered=parameter_count(skeleton) - sum(layers) + max(layers, default=0),
        flops_per_position=sum(training_flops(skeleton, row_positions)),
        row_positions=row_positions,
        memory_bytes=memory_bytes,
        workers_on_machine=workers_on_machine,
    )


def _first_parts(objective: Objective[Any], config: TrainingConfig) -> Iterator[Batch]:
    """The micro-batches of the first steps, on rank 0."""
    for step in range(min(_TRIAL_BATCHES, config.steps)):
        rows = objective.batch(step, 0, config.most_workers)
        for begin in range(0, len(rows), config.micro_batch_rows):
            yield rows.part(begin, min(begin + config.micro_batch_rows, len(rows)))
