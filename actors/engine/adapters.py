"""Low-rank adapters (LoRA; Hu et al. 2021) over the lean decoder's weights, each token of a step with its own or none.

An adapter is what `peft` saves: two thin factors for some linear layers of a model. They are laid out as the decoder's
own layers are, so that a step's tokens go through the base together, and each group of tokens with one adapter through
its factors as well. Tokens without an adapter cost what they did before, and nothing of one group reaches another. The
tokens are those of the merged model up to rounding. What `peft` can do beyond factors (DoRA, trained biases, whole
layers) is refused.

Shape suffixes: N token of the step, C in, O out, R rank.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from actors.engine.linear import Linear
from configs.errors import ArtifactError, CorruptArtifactError

if TYPE_CHECKING:
    from actors.engine.scheduler import Span

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PAIR = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight")
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None), "use_rslora": (False, None),
    "fan_in_fan_out": (False, None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}  # fmt: skip
"""What an adapter's config may say where that decides how its factors are used."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""Of one linear layer: [R, C], and [O, R] times the adapter's scale; fp32."""
_Layer = TypeVar("_Layer", bound=Any)


class LowRank:
    """What an adapter adds to one linear layer, or to several of the same input side by side."""

    def __init__(self, down: Linear, up: Linear) -> None:
        self._down = down
        self._up = up

    @classmethod
    def of(
        cls, parts: Sequence[tuple[Factors | None, int]], *, dtype: torch.dtype, device: torch.device
    ) -> Self | None:
        """Of layers with so many outputs each; None if no part has factors."""
        there = [factors for factors, _ in parts if factors is not None]
        if not there:
            return None
        up_OR = torch.zeros(sum(size for _, size in parts), sum(len(down_RC) for down_RC, _ in there))
        row = column = 0
        for factors, size in parts:
            if factors is not None:
                rank = len(factors[0])
                up_OR[row : row + size, column : column + rank] = factors[1]
                column += rank
            row += size
        to: dict[str, Any] = {"dtype": dtype, "device": device}
        return cls(Linear(torch.cat([down_RC for down_RC, _ in there]).to(**to), None), Linear(up_OR.to(**to), None))

    def add_to(self, out_NO: torch.Tensor, x_NC: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Adds to the `rows` of `out_NO`, contiguous, what comes of theirs in `x_NC`; None stands for all."""
        if rows is None:
            self._up.add_to(out_NO, self._down(x_NC))
        else:
            out_NO.index_add_(0, rows, self._up(self._down(x_NC[rows])))


@dataclass(frozen=True, eq=False)
class Adapter:
    """The factors of one adapter. In use as long as a request holds it."""

    key: str
    """Tells it from others: equal keys, equal factors."""
    layers: tuple[Mapping[str, LowRank], ...]
    """For each layer of the decoder, by the names of its linear layers."""


class Adapted:
    """A linear layer of a step in which some tokens have adapters."""

    def __init__(self, linear: Linear, added: Sequence[tuple[LowRank, torch.Tensor | None]]) -> None:
        self._linear = linear
        self._added = added

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        """As `Linear`."""
        out_NO = self._linear(x_NC)
        for low_rank, rows in self._added:
            low_rank.add_to(out_NO, x_NC, rows)
        return out_NO

    def add_to(self, residual_NO: torch.Tensor, x_NC: torch.Tensor) -> None:
        """As `Linear`."""
        self._linear.add_to(residual_NO, x_NC)
        for low_rank, rows in self._added:
            low_rank.add_to(residual_NO, x_NC, rows)


def adapted(layers: Sequence[_Layer], spans: Sequence[Span], device: torch.device) -> Sequence[_Layer]:
    """A decoder's layers (dataclasses with `Linear` fields) for a step: with the adapters that its spans ask for."""
    groups = _groups(spans, device)
    if not groups:
        return layers
    found = []
    for index, layer in enumerate(layers):
        names = sorted({name for adapter, _ in groups for name in adapter.layers[index]})
        added = {
            name: [(a.layers[index][name], rows) for a, rows in groups if name in a.layers[index]] for name in names
        }
        found.append(replace(layer, **{name: Adapted(getattr(layer, name), added[name]) for name in names}))
    return found


def _groups(spans: Sequence[Span], device: torch.device) -> list[tuple[Adapter, torch.Tensor | None]]:
    """The adapters of a step and the numbers of their tokens; None for all tokens of the step."""
    if all(span.adapter is None for span in spans):
        return []
    found: dict[str, tuple[Adapter, list[int]]] = {}
    count = 0
    for span in spans:
        if span.adapter is not None:
            rows = found.setdefault(span.adapter.key, (span.adapter, []))[1]
            rows.extend(range(count, count + len(span.tokens)))
        count += len(span.tokens)
    return [
        (adapter, None if len(rows) == count else torch.tensor(rows, device=device)) for adapter, rows in found.values()
    ]


def read_factors(folder: Path) -> dict[str, Factors]:
    """The factors of a folder that `peft` wrote, by the name of the layer in the base model.

    Raises `ArtifactError` if there is no such adapter or it is more than factors, `CorruptArtifactError` if its files
    cannot be read or hold what is no number.
    """
    scale = _scale(folder / _CONFIG)
    path = folder / _WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error}", next_step="ganymede artifacts verify") from error
    for name, tensor in tensors.items():
        whole = _PAIR.fullmatch(name)
        if whole is None or not {_PREFIX + whole[1] + side for side in (_DOWN, _UP)} <= tensors.keys():
            raise _unsupported(folder, f"{path.name} holds {name}")
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptArtifactError(f"{path}: {name} holds what is no number", next_step="train it again")
    modules = sorted({name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)})
    return {
        module.removeprefix(_PREFIX): (tensors[module + _DOWN].float(), tensors[module + _UP].float() * scale)
        for module in modules
    }


def _scale(path: Path) -> float:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is no adapter's config: {error}", allowed="a folder that peft wrote") from error
    for key, allowed in _PLAIN.items():
        if said.get(key) not in allowed:
            raise _unsupported(path.parent, f"{key} is {said.get(key)!r}")
    return float(said["lora_alpha"]) / int(said["r"])


def _unsupported(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"the adapter in {folder} is not supported by the engine",
        received=reason,
        allowed="LoRA factors of a decoder's linear layers",
        next_step="train it with lora.merge: true, and serve the merged model",
    )
