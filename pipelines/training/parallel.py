"""Synchronous data parallelism: a fixed layout for gradients, and one reduction a step.

All gradients live in one flat buffer whose layout is the model's parameter order, and one sum over all ranks carries
them together with the loss, the token count and the stop flag. A fixed layout is what makes a resumed run bit-identical
to an uninterrupted one: `DistributedDataParallel` lays its buckets out anew after the first step, which changes the
order of the sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; a single process needs no process group."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The place of this process in the default process group."""
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all ranks in place and returns it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def from_first(self, value: int, device: torch.device) -> int:
        """The `value` that rank 0 holds, on every rank."""
        shared = torch.tensor([value if self.rank == 0 else 0], dtype=torch.int64, device=device)
        return int(self.sum(shared).item())


class GradientBuffer:
    """The gradients of `parameters` as views of one tensor, followed by `extra` scalars that are summed with them."""

    def __init__(self, parameters: Iterable[nn.Parameter], extra: int) -> None:
        self._parameters = list(parameters)
        size = sum(p.numel() for p in self._parameters)
        device = self._parameters[0].device
        self._all = torch.zeros(size + extra, dtype=torch.float32, device=device)
        self.gradients = self._all[:size]
        self.extra = self._all[size:]
        start = 0
        for parameter in self._parameters:
            parameter.grad = self.gradients[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def clear(self) -> None:
        """Zeroes gradients and scalars."""
        self._all.zero_()

    def sum(self, ranks: Ranks) -> None:
        """Replaces gradients and scalars by their sums over all ranks."""
        ranks.sum(self._all)
