"""Optimizers: AdamW, and Muon for hidden matrices with AdamW for everything else.

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
    orthogonalises every world_size-th matrix of a stack, and the updates are exchanged in one sum with zeros, so the
    weights do not depend on who did what.
    """

    def __init__(self, matrices: Mapping[str, nn.Parameter], *, weight_decay: float, dtype: torch.dtype) -> None:
        self._matrices = dict(matrices)
        self._weight_decay = weight_decay
        self._dtype = dtype
        self.momentum = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        self._stacks: dict[torch.Size, list[str]] = {}
        for name, parameter in self._matrices.items():
            self._stacks.setdefault(parameter.shape, []).append(name)

    @torch.no_grad()
    def step(self, rate: float, ranks: Ranks) -> None:
        """One update at learning rate `rate`."""
        if not self._matrices:
            return
        updates = {name: torch.zeros_like(p) for name, p in self._matrices.items()} if ranks.world_size > 1 else {}
        for names in self._stacks.values():
            for name in names:
                self.momentum[name].lerp_(self._matrices[name].grad, 1 - _MOMENTUM)
            mine = names[ranks.rank :: ranks.world_size]
            if mine:
                looked_ahead = [torch.lerp(self._matrices[n].grad, self.momentum[n], _MOMENTUM) for n in mine]
                updates.update(zip(mine, orthogonalise(torch.stack(looked_ahead), self._dtype), strict=True))
        if ranks.world_size > 1:
            names = list(self._matrices)
            flat = ranks.sum(torch.cat([updates[name].flatten() for name in names]))
            parts = flat.split([self._matrices[name].numel() for name in names])
            updates = {name: part.view_as(self._matrices[name]) for name, part in zip(names, parts, strict=True)}
        for name, parameter in self._matrices.items():
            scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            parameter.mul_(1 - rate * self._weight_decay).add_(updates[name], alpha=-rate * scale)


class Optimizer:
    """The optimizer that `config` names, over all trainable parameters of `model`.

    AdamW's weight decay applies to matrices only, not to norms and biases.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, *, dtype: torch.dtype) -> None:
        self._config = config
        matrices = hidden_matrices(model) if config.name == "muon" else {}
        self._muon = Muon(matrices, weight_decay=config.weight_decay, dtype=dtype)
        self._adam_parameters = {
            name: p for name, p in model.named_parameters() if p.requires_grad and name not in matrices
        }
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

    def state(self) -> dict[str, Tensor]:
        """Everything that later steps depend on, by a flat name; empty for AdamW's part before the first step."""
        state = {f"muon/{name}": momentum for name, momentum in self._muon.momentum.items()}
        for name, parameter in self._adam_parameters.items():
            for key, value in self._adam.state[parameter].items():
                state[f"adamw/{name}/{key}"] = value
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state()` gave for the same model and config."""
        for name, momentum in self._muon.momentum.items():
            momentum.copy_(state[f"muon/{name}"])
        for name, parameter in self._adam_parameters.items():
            prefix = f"adamw/{name}/"
            self._adam.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device)
                for key, value in state.items()
                if key.startswith(prefix)
            }
