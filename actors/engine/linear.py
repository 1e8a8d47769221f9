"""Linear layers for steps of few rows, norms and activations: on the compiled kernels where there are any, on torch
elsewhere.

Even where torch's own norms and activations are fast, they share out a few rows over all threads, which then wait for
each other: where another process has taken a core, 5 ms for what one thread does in 0.01.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor: N row, C in, O out

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, cast, get_args

import torch
import torch.nn.functional as F

from actors.engine import kernels, large_pages
from actors.engine.kernels import kernels_for


class Linear:
    """A weight [O, C] and a bias, laid out for products with few rows."""

    def __init__(self, weight_OC: torch.Tensor, bias_O: torch.Tensor | None, *, int8: bool = False) -> None:
        """With `int8`, which the compiled kernels are needed for, weights are rounded to 255 steps of each output's own
        size; the products stay fp32."""
        self.out_features = len(weight_OC)
        self.dtype, self.device = weight_OC.dtype, weight_OC.device
        self.bias_O = bias_O
        """As long as the weight is wide in the layout at hand."""
        self.scales_O: torch.Tensor | None = None
        """Of weights that are int8, likewise."""
        self._kernels = kernels_for(self.dtype, self.device)
        if self._kernels is None:
            # With few rows, twice as fast on a CPU as the layout of `nn.Linear`.
            self.weight = weight_OC.t().contiguous()
        else:
            beyond = -self.out_features % self._kernels.panel
            self.bias_O = None if bias_O is None else F.pad(bias_O, (0, beyond))
            padded_OC = F.pad(weight_OC, (0, 0, 0, beyond))
            if int8:
                self.scales_O = (padded_OC.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
                padded_OC = (padded_OC / self.scales_O[:, None]).round_()
            panels = padded_OC.unflatten(0, (-1, self._kernels.panel)).transpose(1, 2)
            self.weight = large_pages.room(panels.shape, torch.int8 if int8 else torch.float32).copy_(panels)

    @property
    def size(self) -> int:
        """Numbers of the weight."""
        return self.weight.numel()

    @classmethod
    def of(
        cls,
        parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        int8: bool = False,
    ) -> Self:
        """Several layers of the same input side by side, each a weight [out, in] and a bias or none."""
        weight_OC = torch.cat([weight for weight, _ in parts]).to(dtype=dtype, device=device)
        if all(bias is None for _, bias in parts):
            return cls(weight_OC, None, int8=int8)
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
        return cls(weight_OC, torch.cat(biases).to(dtype=dtype, device=device), int8=int8)

    @classmethod
    def fused(cls, modules: Sequence[Any], scales: Sequence[float] = (), **to: Any) -> Self:
        """Several `nn.Linear` of the same input side by side, each times its scale."""
        parts = [
            (module.weight.float() * scale, None if module.bias is None else module.bias.float() * scale)
            for module, scale in zip(modules, scales or [1.0] * len(modules), strict=True)
        ]
        return cls.of(parts, **to)

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        """[N, O]: `x_NC` times the weight, plus the bias."""
        if self._kernels is None:
            return x_NC @ self.weight if self.bias_O is None else torch.addmm(self.bias_O, x_NC, self.weight)
        out_NO = x_NC.new_empty(len(x_NC), self.out_features)
        self._kernels.product(x_NC.contiguous(), self.weight, self.scales_O, self.bias_O, out_NO, add=False)
        return out_NO

    def add_to(self, residual_NO: torch.Tensor, x_NC: torch.Tensor) -> None:
        """Adds what the layer makes of `x_NC` to `residual_NO`, contiguous, in place."""
        if self._kernels is None:
            if self.bias_O is not None:
                residual_NO.add_(self.bias_O)
            residual_NO.addmm_(x_NC, self.weight)
        else:
            self._kernels.product(x_NC.contiguous(), self.weight, self.scales_O, self.bias_O, residual_NO, add=True)

    def rows(self, indices_N: torch.Tensor) -> torch.Tensor:
        """The weights [N, C] of some outputs: what an embedding looks up that is tied to its head."""
        if self._kernels is None:
            return F.embedding(indices_N, self.weight.t())
        wide = self._kernels.panel
        found_NC: torch.Tensor = self.weight[indices_N // wide, :, indices_N % wide]
        return found_NC if self.scales_O is None else found_NC * self.scales_O[indices_N, None]


class RmsNorm:
    """Root mean square normalisation over the last dimension."""

    def __init__(self, weight_C: torch.Tensor, epsilon: float) -> None:
        self.weight_C = weight_C
        self.epsilon = epsilon
        self._kernels = kernels_for(weight_C.dtype, weight_C.device)

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        """`x_NC`, normalised and times the weight."""
        if self._kernels is None:
            return F.rms_norm(x_NC, self.weight_C.shape, self.weight_C, self.epsilon)
        return self._kernels.rms_norm(x_NC, self.weight_C, self.epsilon)


class LayerNorm:
    """Layer normalisation over the last of two dimensions."""

    def __init__(self, weight_C: torch.Tensor, bias_C: torch.Tensor, epsilon: float) -> None:
        self._weight_C, self._bias_C = weight_C, bias_C
        self._epsilon = epsilon
        self._kernels = kernels_for(weight_C.dtype, weight_C.device)

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        """`x_NC`, normalised, times the weight, plus the bias."""
        if self._kernels is None:
            return F.layer_norm(x_NC, self._weight_C.shape, self._weight_C, self._bias_C, self._epsilon)
        return self._kernels.layer_norm(x_NC, self._weight_C, self._bias_C, self._epsilon)


class Activation:
    """What `transformers` calls `name`; if `gated`, of the first half of each row, times the second half."""

    def __init__(self, name: str, *, gated: bool, dtype: torch.dtype, device: torch.device) -> None:
        self._gated = gated
        self._kernels = kernels_for(dtype, device) if name in get_args(kernels.Activation) else None
        self._name = cast(kernels.Activation, name)
        self._of_torch = _of_torch(name)

    def __call__(self, x_NX: torch.Tensor) -> torch.Tensor:
        """[N, I] of a contiguous [N, I], or of [N, 2 I] if gated."""
        if self._kernels is not None:
            return self._kernels.activate(self._name, x_NX, gated=self._gated)
        if not self._gated:
            return self._of_torch(x_NX)
        gate_NI, up_NI = x_NX.chunk(2, dim=-1)
        return self._of_torch(gate_NI) * up_NI


class PackedLinear(torch.nn.Module):
    """Stands for an `nn.Linear` inside a model of `transformers`."""

    weight = None
    """Some modules ask for the type of a neighbour's weight, and take None for one that needs no conversion."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., O] of [..., C]."""
        return self._linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def pack(model: torch.nn.Module) -> None:
    """Lays out the linear layers of a model anew for the compiled kernels, where it can use them.

    A head that is tied to an embedding is held twice then.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            parts = _linear_parts(child)
            if parts is not None and kernels_for(parts[0].dtype, parts[0].device) is not None:
                setattr(module, name, PackedLinear(Linear(*parts)))


def _of_torch(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == "silu":
        return F.silu
    if name == "gelu_new":  # `transformers` has seven operations for what torch does in one
        return partial(F.gelu, approximate="tanh")
    from transformers.activations import ACT2FN

    found: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return found


def _linear_parts(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight [out, in] and bias of what is a linear layer and nothing more; None for anything else."""
    if type(module) is torch.nn.Linear:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    from transformers.pytorch_utils import Conv1D

    if type(module) is Conv1D:
        return module.weight.detach().t(), module.bias.detach()
    return None
