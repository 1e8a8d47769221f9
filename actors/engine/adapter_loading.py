"""An adapter's folder opened for the lean decoder: its factors fused, ordered and scaled as the weights they add to.

Shape suffixes: C in, O out, R rank.
"""

# ruff: noqa: N806 - names end in the shape of their tensor

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.engine.adapters import Adapter, Factors, LowRank, read_factors
from actors.engine.decoder import LeanDecoder, Shape, in_pairs, obstacle
from actors.engine.pretrained import read_config
from actors.text import Text
from configs.errors import ArtifactError, ContractError

ADAPTER = "adapter"
"""Folder of an artifact that holds what peft wrote."""


def check_adapter(base: Path, folder: Path) -> None:
    """Raises unless the engine can run the adapter of the artifact in `folder` over the model in `base`.

    `ArtifactError` if it is no adapter, not of this model, or the model is not run by the lean decoder;
    `CorruptArtifactError` if it cannot be read; `ContractError` if it was trained with another tokenizer or template.
    """
    config = read_config(base)
    reason = obstacle(config)
    if reason is not None:
        raise not_lean(reason)
    check_text(folder, Text.load(base))
    _check_fits(folder, read_factors(folder / ADAPTER), _sizes(Shape.of(config)))


def check_text(folder: Path, text: Text) -> None:
    """Raises `ContractError` unless the adapter in `folder` was trained with this tokenizer and chat template."""
    found, expected = Text.load(folder).fingerprint(), text.fingerprint()
    if found != expected:
        raise ContractError(
            f"the adapter in {folder} was trained with another tokenizer or chat template than its model's",
            received=f"hash {found[:12]}",
            allowed=f"hash {expected[:12]}",
            next_step="serve it over the model that it was trained on",
        )


def not_lean(reason: str) -> ArtifactError:
    """Of a model that takes no adapters."""
    return ArtifactError(
        "adapters are run over the lean decoder only",
        received=reason,
        allowed="models shaped like Llama",
        next_step="train with lora.merge: true, and serve the merged model",
    )


def load_adapter(decoder: LeanDecoder, folder: Path, key: str) -> Adapter:
    """The adapter of the artifact in `folder`, laid out as the layers of `decoder`, which may run meanwhile.

    Raises `ArtifactError` if it is none, or not of this model, `CorruptArtifactError` if it cannot be read.
    """
    factors = read_factors(folder / ADAPTER)
    _check_fits(folder, factors, _sizes(decoder.shape))
    layout = _Layout(decoder, factors)
    return Adapter(key, tuple(layout.layer(f"model.layers.{n}.") for n in range(decoder.shape.layers)))


def _sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """[out, in] of the linear layers of the body, by name."""
    hidden, heads, kv_heads = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (shape.inner, hidden),
        "mlp.up_proj": (shape.inner, hidden),
        "mlp.down_proj": (hidden, shape.inner),
    }
    return {f"model.layers.{n}.{name}": size for n in range(shape.layers) for name, size in sizes.items()}


def _check_fits(folder: Path, factors: Mapping[str, Factors], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raises `ArtifactError` unless every layer of the adapter is one of the model's, of the same size."""
    for name, (down_RC, up_OR) in factors.items():
        size = (len(up_OR), down_RC.shape[1])
        if sizes.get(name) != size or len(down_RC) != up_OR.shape[1]:
            allowed = f"{name} of {sizes[name]}" if name in sizes else "the linear layers of the model's body"
            raise ArtifactError(
                f"the adapter in {folder} does not fit the model",
                received=f"{name} of {size}",
                allowed=allowed,
                next_step="serve it over the model that it was trained on",
            )


class _Layout:
    """The factors as `LayerWeights` has the weights."""

    def __init__(self, decoder: LeanDecoder, factors: Mapping[str, Factors]) -> None:
        self._shape = decoder.shape
        self._factors = factors
        self._sizes = _sizes(decoder.shape)
        self._query_scale = decoder.shape.head_dim**-0.5 if decoder.scales_queries else 1.0
        self._to: dict[str, Any] = {"dtype": decoder.dtype, "device": decoder.device}

    def layer(self, prefix: str) -> Mapping[str, LowRank]:
        """Of one transformer layer, by the names of its linear layers; without those that nothing is added to."""
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        fused = {
            "qkv": [
                self._in_pairs(attention + "q_proj", self._shape.heads, self._query_scale),
                self._in_pairs(attention + "k_proj", self._shape.kv_heads, 1.0),
                self._part(attention + "v_proj"),
            ],
            "out": [self._part(attention + "o_proj")],
            "gate_up": [self._part(mlp + "gate_proj"), self._part(mlp + "up_proj")],
            "down": [self._part(mlp + "down_proj")],
        }
        found = {name: LowRank.of(parts, **self._to) for name, parts in fused.items()}
        return {name: low_rank for name, low_rank in found.items() if low_rank is not None}

    def _part(self, module: str) -> tuple[Factors | None, int]:
        return self._factors.get(module), self._sizes[module][0]

    def _in_pairs(self, module: str, heads: int, scale: float) -> tuple[Factors | None, int]:
        factors, size = self._part(module)
        return (None if factors is None else (factors[0], in_pairs(factors[1], heads) * scale)), size
