"""Synchronous data parallelism: what ranks exchange, a fixed layout for gradients, and one reduction a step.

All gradients live in one flat buffer whose layout is the model's parameter order, and one sum over all ranks carries
them together with the loss, the token count and the stop flag. A fixed layout is what makes a resumed run bit-identical
to an uninterrupted one: `DistributedDataParallel` lays its buckets out anew after the first step, which changes the
order of the sums. In a sharded run the buffer holds this rank's rows of the gradients, which the backward pass has
already summed, and the sum over the ranks carries the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; a single process needs no process group."""

    rank: int = 0
    world_size: int = 1
    group: torch.distributed.ProcessGroup | None = None
    """The group that they exchange through; None: the default one."""

    @classmethod
    def current(cls) -> Ranks:
        """The place of this process in the default process group."""
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def apart(self, timeout: timedelta) -> Ranks:
        """The same processes with a group of their own for what lies in host memory, which another thread may use.

        All of them call this at the same time. An exchange that some do not come to within `timeout` is an error.
        """
        if self.world_size == 1:
            return self
        return dataclasses.replace(self, group=torch.distributed.new_group(backend="gloo", timeout=timeout))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all ranks in place and returns it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def from_first(self, value: int, device: torch.device) -> int:
        """The `value` that rank 0 holds, on every rank."""
        shared = torch.tensor([value if self.rank == 0 else 0], dtype=torch.int64, device=device)
        return int(self.sum(shared).item())

    def rows(self, count: int) -> range:
        """Which of `count` rows this rank holds where each holds a part: ceil(count / ranks) of them, the last fewer.

        FSDP2 cuts weights this way, as `torch.chunk` does.
        """
        each = -(-count // self.world_size)
        return range(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def gather(self, value: bytes, device: torch.device) -> list[bytes]:
        """The `value` of every rank, in their order, on every rank; all must be of one length."""
        values = torch.zeros((self.world_size, len(value)), dtype=torch.int64, device=device)
        values[self.rank] = torch.tensor(list(value), dtype=torch.int64)
        return [bytes(row) for row in self.sum(values).tolist()]

    def exchange(self, parts: Tensor) -> Tensor:
        """Part r of `parts` [world_size, ...] goes to rank r; what came from rank r is part r of the result."""
        if self.world_size == 1:
            return parts
        received = torch.empty_like(parts)
        torch.distributed.all_to_all_single(received, parts, group=self.group)
        return received


class GradientBuffer:
    """The gradients of `weights` as views of one tensor, followed by `extra` scalars that are summed with them.

    `sharded`: the weights are this rank's part of all, and their gradients are summed over the ranks by others.
    """

    def __init__(self, weights: Iterable[Tensor], extra: int, *, sharded: bool = False) -> None:
        held = list(weights)
        size = sum(weight.numel() for weight in held)
        device = held[0].device
        self._sharded = sharded
        self._all = torch.zeros(size + extra, dtype=torch.float32, device=device)
        self.gradients = self._all[:size]
        self.extra = self._all[size:]
        start = 0
        for weight in held:
            weight.grad = self.gradients[start : start + weight.numel()].view_as(weight)
            start += weight.numel()

    def clear(self) -> None:
        """Zeroes gradients and scalars."""
        self._all.zero_()

    def sum(self, ranks: Ranks) -> None:
        """Replaces gradients and scalars by their sums over all ranks."""
        ranks.sum(self.extra if self._sharded else self._all)

    def norm(self, ranks: Ranks) -> Tensor:
        """L2 norm of the gradients of all weights, a scalar, the same on every rank."""
        norm = torch.linalg.vector_norm(self.gradients)
        return ranks.sum(norm.square()).sqrt() if self._sharded else norm
