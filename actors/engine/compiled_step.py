"""One step of the lean decoder as one call of the compiled functions (`native/llama.c`).

Between the layers there is neither Python nor torch, whose hundred operations a step take longer than the arithmetic
of a small model, and threads begin and end once a step.

Shape suffixes: N token of the step, W token whose logits are wanted, V vocabulary, C hidden, L position, D head dim.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.engine.cache import KVCache
from actors.engine.kernels import Kernels, address
from actors.engine.linear import Linear, RmsNorm
from actors.engine.scheduler import Span

_SMALL = 1 << 20
"""Multiplications that one thread has done before others have begun."""
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float


class _Weight(ctypes.Structure):
    _fields_ = (("panels", _POINTER), ("scales", _POINTER), ("bias", _POINTER))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", _Weight), ("out", _Weight), ("gate_up", _Weight), ("down", _Weight),
        ("attention_norm", _POINTER), ("mlp_norm", _POINTER), ("head_norm", _POINTER),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", _POINTER), ("embedding", _POINTER), ("norm", _POINTER), ("head", _Weight), ("rotations", _POINTER),
        ("depth", _INT), ("vocab", _INT), ("hidden", _INT), ("heads", _INT), ("kv_heads", _INT), ("size", _INT),
        ("inner", _INT), ("epsilon", _FLOAT),
    )  # fmt: skip


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("ids", _POINTER), ("positions", _POINTER), ("rows", _POINTER), ("lengths", _POINTER), ("wanted", _POINTER),
        ("count", _INT), ("wanted_count", _INT),
    )  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (
        ("all", _POINTER), ("layer_stride", _LONG), ("values", _LONG), ("row_stride", _LONG), ("head_stride", _LONG)
    )  # fmt: skip


@dataclass(frozen=True)
class LayerWeights:
    """One layer of the lean decoder."""

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    attention_norm: RmsNorm
    mlp_norm: RmsNorm
    head_norm: torch.Tensor | None
    """Weights of the norms of queries and keys, a row for each of these heads."""


class CompiledStep:
    """A model's weights as the compiled functions take them. Holds no state between calls."""

    def __init__(
        self,
        kernels: Kernels,
        *,
        embedding_VC: torch.Tensor | None,
        layers: Sequence[LayerWeights],
        norm: RmsNorm,
        head: Linear,
        rotations_LD: torch.Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        """The arguments are those of `LeanDecoder`."""
        self._library = kernels.library
        self._held: list[Any] = [embedding_VC, layers, norm, head, rotations_LD]
        """What the addresses below belong to."""
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._vocab = head.out_features
        self._weights = head.size + sum(
            part.size for layer in layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)
        )
        self._model = _Model(
            layers=ctypes.addressof(self._layers),
            embedding=address(embedding_VC),
            norm=norm.weight_C.data_ptr(),
            head=_weight(head),
            rotations=rotations_LD.data_ptr(),
            depth=len(layers),
            vocab=self._vocab,
            hidden=len(norm.weight_C),
            heads=heads,
            kv_heads=kv_heads,
            size=head_dim,
            inner=layers[0].gate_up.out_features // 2,
            epsilon=norm.epsilon,
        )

    def run(self, spans: Sequence[Span], cache: KVCache, wanted: Sequence[int]) -> torch.Tensor:
        """See `LeanDecoder.run`. Raises `MemoryError`, or what torch does, where there is no memory for it."""
        ids, positions, rows, lengths = array("l"), array("l"), array("l"), array("l")
        for span in spans:
            ids.extend(span.tokens)
            positions.extend(range(span.start, span.stop))
            lengths.extend(range(span.start + 1, span.stop + 1))
            rows.extend([span.row] * len(span.tokens))
        chosen = array("l", wanted)
        tokens = _Tokens(*map(_begin, (ids, positions, rows, lengths, chosen)), len(ids), len(chosen))
        threads = 1 if len(ids) * self._weights < _SMALL else torch.get_num_threads()
        model, longest = ctypes.byref(self._model), max(lengths)
        room = torch.empty(self._library.llama_room(model, len(ids), longest, threads))
        logits_WV = torch.empty(len(chosen), self._vocab)
        if self._library.llama_step(
            model, ctypes.byref(tokens), ctypes.byref(_cache(cache)), longest, room.data_ptr(), logits_WV.data_ptr(),
            threads,
        ):  # fmt: skip
            raise MemoryError("no memory to plan a step")
        return logits_WV


def _begin(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]


def _weight(linear: Linear) -> _Weight:
    return _Weight(linear.weight.data_ptr(), address(linear.scales_O), address(linear.bias_O))


def _layer(layer: LayerWeights) -> _Layer:
    return _Layer(
        qkv=_weight(layer.qkv),
        out=_weight(layer.out),
        gate_up=_weight(layer.gate_up),
        down=_weight(layer.down),
        attention_norm=layer.attention_norm.weight_C.data_ptr(),
        mlp_norm=layer.mlp_norm.weight_C.data_ptr(),
        head_norm=address(layer.head_norm),
    )


def _cache(cache: KVCache) -> _Cache:
    kv_LARKPD = cache.view
    layer, values, row, head, _, _ = kv_LARKPD.stride()
    return _Cache(kv_LARKPD.data_ptr(), layer, values, row, head)
