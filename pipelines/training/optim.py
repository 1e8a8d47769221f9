"""Optimizers: AdamW, and Muon for hidden matrices with AdamW for everything else.

Both work on what a rank holds of each weight: all of it, or in a sharded run some of its rows.
`torch.optim.Muon` always orthogonalises in bf16, one matrix after another, on every rank. On a processor without bf16
that is eight times slower than fp32 (256x256 matrices, AVX2: 30 ms against 3.6 ms for a stack of six), so this one uses
fp32 unless the run's precision is bf16, works on stacks of equal shape, and shares the work out over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from configs.schema.training import OptimConfig
from pipelines.training.models import hidden_matrices
from pipelines.training.parallel import Ranks

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95
_ADAM_KINDS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a weight, by its own names."""


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, to a stack [count, rows, columns]; computed in `dtype`.

    Newton-Schulz iteration with the quintic coefficients of Jordan et al. (2024), "Muon": singular values end between
    about 0.7 and 1.2.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Muon (Jordan et al. 2024) over matrices that hold their gradients in `.grad`.

    Updates of a matrix [rows, columns] are scaled by sqrt(max(1, rows/columns)); weight decay is decoupled. Rank r
    orthogonalises every world_size-th matrix of a stack, so the weights do not depend on who did what. Where ranks hold
    whole matrices, the updates are exchanged in one sum with zeros; where they hold rows, a matrix is brought together
    on the rank that orthogonalises it, and the rows of its update go back.

    Args:
        matrices: what this rank holds of each matrix, by name.
        shapes: of the whole matrices.
        sharded: ranks hold rows, cut as `pipelines.training.sharding` says.
    """

    def __init__(
        self,
        matrices: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
        *,
        weight_decay: float,
        dtype: torch.dtype,
        sharded: bool,
    ) -> None:
        self._matrices = dict(matrices)
        self._shapes = shapes
        self._weight_decay = weight_decay
        self._dtype = dtype
        self._sharded = sharded
        self.momentum = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        self._stacks: dict[torch.Size, list[str]] = {}
        for name in self._matrices:
            self._stacks.setdefault(shapes[name], []).append(name)

    @torch.no_grad()
    def step(self, rate: float, ranks: Ranks) -> None:
        """One update at learning rate `rate`."""
        if not self._matrices:
            return
        for name, momentum in self.momentum.items():
            momentum.lerp_(self._matrices[name].grad, 1 - _MOMENTUM)
        updates = self._updates_of_rows(ranks) if self._sharded else self._updates(ranks)
        for name, parameter in self._matrices.items():
            rows, columns = self._shapes[name]
            scale = max(1.0, rows / columns) ** 0.5
            parameter.mul_(1 - rate * self._weight_decay).add_(updates[name], alpha=-rate * scale)

    def _updates(self, ranks: Ranks) -> dict[str, Tensor]:
        """The directions of whole matrices."""
        updates = {name: torch.zeros_like(p) for name, p in self._matrices.items()} if ranks.world_size > 1 else {}
        for names in self._stacks.values():
            mine = names[ranks.rank :: ranks.world_size]
            if mine:
                looked_ahead = torch.stack([self._looked_ahead(name) for name in mine])
                updates.update(zip(mine, orthogonalise(looked_ahead, self._dtype), strict=True))
        if ranks.world_size == 1:
            return updates
        names = list(self._matrices)
        flat = ranks.sum(torch.cat([updates[name].flatten() for name in names]))
        parts = flat.split([self._matrices[name].numel() for name in names])
        return {name: part.view_as(self._matrices[name]) for name, part in zip(names, parts, strict=True)}

    def _updates_of_rows(self, ranks: Ranks) -> dict[str, Tensor]:
        """The rows that this rank holds of each direction; a stack at a time, of which it sees 1/world_size whole."""
        world_size = ranks.world_size
        updates: dict[str, Tensor] = {}
        for (rows, columns), names in self._stacks.items():
            each, part = -(-len(names) // world_size), len(Ranks(0, world_size).rows(rows))
            mine = len(names[ranks.rank :: world_size])
            places = {name: divmod(number, world_size)[::-1] for number, name in enumerate(names)}
            sent = self._matrices[names[0]].new_zeros(world_size, each, part, columns)
            for name, place in places.items():
                sent[place][: len(self._matrices[name])] = self._looked_ahead(name)
            whole = ranks.exchange(sent).transpose(0, 1).reshape(each, world_size * part, columns)
            if mine:
                whole[:mine, :rows] = orthogonalise(whole[:mine, :rows], self._dtype)
            back = ranks.exchange(whole.view(each, world_size, part, columns).transpose(0, 1).contiguous())
            updates |= {name: back[place][: len(self._matrices[name])] for name, place in places.items()}
        return updates

    def _looked_ahead(self, name: str) -> Tensor:
        return torch.lerp(self._matrices[name].grad, self.momentum[name], _MOMENTUM)


class Optimizer:
    """The optimizer that `config` names, over all trainable parameters of `model`.

    AdamW's weight decay applies to matrices only, not to norms and biases.

    Args:
        model: tells which weights are hidden matrices.
        held: what this rank holds of each trainable weight, with its gradient in `.grad`.
        config: optimizer and rates.
        dtype: what Muon computes in.
        sharded: ranks hold rows of each weight, not all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        held: Mapping[str, Tensor],
        config: OptimConfig,
        *,
        dtype: torch.dtype,
        sharded: bool = False,
    ) -> None:
        self._config = config
        shapes = {name: p.shape for name, p in hidden_matrices(model).items()} if config.name == "muon" else {}
        matrices = {name: held[name] for name in shapes}
        self._muon = Muon(matrices, shapes, weight_decay=config.weight_decay, dtype=dtype, sharded=sharded)
        self._adam_parameters = {name: weight for name, weight in held.items() if name not in shapes}
        parameters = list(self._adam_parameters.values())
        self._adam = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )

    def step(self, factor: float, ranks: Ranks) -> None:
        """One update at `factor` times the peak learning rates, from the gradients in `.grad`."""
        for group in self._adam.param_groups:
            group["lr"] = factor * self._config.learning_rate
        self._adam.step()
        self._muon.step(factor * self._config.muon_learning_rate, ranks)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What later steps depend on beside their number: tensors like what is held of a weight, by kind and weight.

        AdamW's are there after the first step.
        """
        state = {"momentum": self._muon.momentum}
        for kind in _ADAM_KINDS:
            state[kind] = {
                name: self._adam.state[weight][kind]
                for name, weight in self._adam_parameters.items()
                if weight in self._adam.state
            }
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Takes over what `state()` gave for the same model and config after `steps` steps."""
        for name, momentum in self._muon.momentum.items():
            momentum.copy_(state["momentum"][name])
        for name, weight in self._adam_parameters.items():
            self._adam.state[weight] = {
                "step": torch.tensor(float(steps), device=weight.device),
                **{kind: state[kind][name].to(weight.device) for kind in _ADAM_KINDS},
            }
