"""Sharded training (FSDP2): every rank holds a part of each weight, of its gradient and of the optimizer's numbers.

Weights are cut by rows (dimension 0) into as many parts as there are ranks, as `torch.chunk` cuts: all but the last are
ceil(rows / ranks) long, and the last may be empty. A layer's whole weights are gathered when it runs, forward or
backward, and dropped after it; what lies outside the layers (embeddings, final norm, output matrix) is gathered for the
whole step. Gradients are summed over the ranks, not averaged, and each rank keeps the rows that it holds.

Zhao et al. 2023, "PyTorch FSDP"; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from pipelines.training.hardware import Hardware
from pipelines.training.parallel import Ranks

R = TypeVar("R")


class Program(nn.Module):
    """A model under one call, `program(objective.loss, rows)`, whatever parts of it are called within.

    Weights are gathered when a module is called, and objectives call a model's body and use its output matrix.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module, R], Tensor], rows: R) -> Tensor:
        """What `compute` makes of the model and `rows`."""
        return compute(self.model, rows)


def shard(program: Program, hardware: Hardware, ranks: Ranks) -> None:
    """Cuts all weights over `ranks` and moves them to the device, one layer after another.

    With bf16, weights are gathered in bf16, and gradients are summed and kept in fp32.
    """
    mesh = init_device_mesh(hardware.device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy()
    if hardware.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*sharded_layers(program), program):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo can neither average nor scale


def sharded_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of `model` whose weights are gathered one after another; none in an LSTM."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def drop_gathered(program: Program) -> None:
    """Drops the weights that a forward pass without a backward one left gathered."""
    if isinstance(program, FSDPModule):
        program.reshard()


def held_weights(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds of each weight that is trained, by name; changing it in place changes the model."""
    return {
        name: parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def collect_gradients(model: nn.Module, held: Mapping[str, Tensor]) -> None:
    """Has the backward pass of a sharded `model` add to the gradients of the weights in `held`."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and name in held:
            parameter.grad = _like(parameter, held[name].grad)


def _like(whole: DTensor, rows: Any) -> DTensor:
    return DTensor.from_local(
        rows, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
