"""The forward pass of Llama-shaped decoders, over the tokens of one engine step.

Weights are read from `config.json` and safetensors files as `transformers` writes them. The linear layers run once
over all tokens of a step, whatever sequences they belong to; only attention goes sequence by sequence for prompts,
and over one block of the cache for decoding. Logits equal those of `transformers` up to rounding.

Shape suffixes: N token of the step, B decoding sequence, T token of a prompt chunk, L position in the cache, C hidden,
H query head, K key/value head, G query heads a kv head, D head dim, V vocabulary.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from actors.engine.cache import KVCache
from actors.engine.scheduler import Span
from configs.errors import ArtifactError, CorruptArtifactError, EngineError

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not change with the length of the sequence."""


@dataclass(frozen=True)
class Shape:
    """What the forward pass needs to know of a model's config."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_epsilon: float

    @classmethod
    def of(cls, config: Any, folder: Path) -> Self:
        """Reads a `transformers` config; raises `ArtifactError` for what the engine cannot run."""
        rope = getattr(config, "rope_parameters", None) or {}
        for key, value, allowed in (
            ("model_type", config.model_type, ("llama",)),
            ("hidden_act", getattr(config, "hidden_act", None), ("silu",)),
            ("rope_type", rope.get("rope_type"), _STATIC_ROPE),
        ):
            if value not in allowed:
                raise ArtifactError(
                    f"{folder / 'config.json'}: this {key} is not supported by the engine",
                    received=value,
                    allowed=", ".join(allowed),
                    next_step="use a Llama-architecture model, or run this one with transformers",
                )
        return cls(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            context=config.max_position_embeddings,
            norm_epsilon=config.rms_norm_eps,
        )


@dataclass(frozen=True)
class _Linear:
    """A weight transposed for `addmm`: with few rows, twice as fast on CPU as the layout of `nn.Linear`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.addmm_(x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


@dataclass(frozen=True)
class _Layer:
    qkv: _Linear
    out: _Linear
    gate_up: _Linear
    down: _Linear
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor


class LlamaDecoder:
    """A Llama-architecture model's weights and forward pass. Holds no state between calls; the cache is the caller's.

    Query and key weights are stored with each head's two halves interleaved, so that a rotary embedding is one
    complex product; attention scores do not change by that. The scores' scale is part of the query weights.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        embedding: torch.Tensor,
        layers: Sequence[_Layer],
        norm: torch.Tensor,
        head: torch.Tensor,
        rotations_LD: torch.Tensor,
    ) -> None:
        self.shape = shape
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rotations_LD = rotations_LD

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Opens a model folder.

        Raises `ArtifactError` if files are missing or the architecture is not supported, `CorruptArtifactError` if
        a weights file cannot be read.
        """
        config = _read_config(folder)
        shape = Shape.of(config, folder)
        weights = _Weights(_read_weights(folder), folder, dtype, device)
        embedding = weights["model.embed_tokens"]
        head = (embedding if config.tie_word_embeddings else weights["lm_head"]).t().contiguous()
        return cls(
            shape,
            # Tied weights are held once, in the layout that the head's product runs fastest with.
            embedding=head.t() if config.tie_word_embeddings else embedding,
            layers=[weights.layer(f"model.layers.{n}.", shape) for n in range(shape.layers)],
            norm=weights["model.norm"],
            head=head,
            rotations_LD=_rotations(config, shape, device),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and cache."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are and the forward pass runs."""
        return self._embedding.device

    def new_cache(self, *, slots: int, positions: int) -> KVCache:
        """An empty cache for this model. Raises `EngineError` if the device has no memory for it."""
        shape = (self.shape.layers, 2, slots, self.shape.kv_heads, positions, self.shape.head_dim)
        try:
            return KVCache(torch.zeros(shape, dtype=self.dtype, device=self.device))
        except RuntimeError as error:
            raise EngineError(
                "no memory for the cache of keys and values",
                received=f"{slots} sequences of {positions} tokens, {_gigabytes(shape, self.dtype):.1f} GB",
                next_step="lower max_sequences or cache_tokens",
            ) from error

    def forward(self, spans: Sequence[Span], cache: KVCache) -> torch.Tensor:
        """Runs the spans' tokens and stores their keys and values; returns the last hidden states [N, C].

        The spans must be in order of slot, each sequence's earlier tokens in the cache, and the leading spans of one
        token in the slots 0, 1, 2 and so on.
        """
        shape = self.shape
        step = _Step(spans, self.device)
        rotations_N1D = self._rotations_LD[step.positions_N][:, None]
        addresses = cache.addresses(step.slots_N, step.positions_N)
        residual_NC = F.embedding(step.tokens_N, self._embedding)
        for index, layer in enumerate(self._layers):
            x_NC = self._normed(residual_NC, layer.attention_norm)
            heads_NHD = layer.qkv(x_NC).view(len(x_NC), -1, shape.head_dim)
            _rotate(heads_NHD[:, : shape.heads + shape.kv_heads], rotations_N1D)
            cache.write(index, heads_NHD[:, shape.heads :], addresses)
            queries_NKGD = heads_NHD[:, : shape.heads].unflatten(1, (shape.kv_heads, -1))
            attended_NC = step.attend(queries_NKGD, cache, index)
            layer.out.add_to(residual_NC, attended_NC)
            gate_NI, up_NI = layer.gate_up(self._normed(residual_NC, layer.mlp_norm)).chunk(2, dim=-1)
            layer.down.add_to(residual_NC, F.silu(gate_NI) * up_NI)
        return residual_NC

    def logits(self, hidden_NC: torch.Tensor) -> torch.Tensor:
        """fp32 logits [N, V] of hidden states."""
        return (self._normed(hidden_NC, self._norm) @ self._head).float()

    def _normed(self, x_NC: torch.Tensor, weight_C: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_NC, (self.shape.hidden,), weight_C, self.shape.norm_epsilon)


class _Step:
    """The tensors that all layers share in one step, and attention over them."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, device=device)

        self.tokens_N = tensor([token for s in spans for token in s.tokens])
        self.positions_N = tensor([position for s in spans for position in range(s.start, s.stop)])
        self.slots_N = tensor([s.slot for s in spans for _ in s.tokens])
        self._decoding = next((n for n, s in enumerate(spans) if len(s.tokens) > 1), len(spans))
        self._chunks = spans[self._decoding :]
        self._longest = max((s.stop for s in spans[: self._decoding]), default=0)
        past_BL = torch.arange(self._longest, device=device) > self.positions_N[: self._decoding, None]
        self._hidden_B11L = past_BL[:, None, None]
        self._visible_TL = [
            torch.arange(s.stop, device=device) <= torch.arange(s.start, s.stop, device=device)[:, None]
            for s in self._chunks
        ]

    def attend(self, queries_NKGD: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        """Attention of each token over its own sequence up to itself; [N, H * D]."""
        parts_KGD = []
        if count := self._decoding:
            keys_BKLD, values_BKLD = cache.rows(layer, slice(count), self._longest)
            scores_BKGL = queries_NKGD[:count] @ keys_BKLD.transpose(-1, -2)
            weights_BKGL = scores_BKGL.masked_fill_(self._hidden_B11L, float("-inf")).softmax(-1)
            parts_KGD.append((weights_BKGL @ values_BKLD).flatten(1))
        first = count
        for span, visible_TL in zip(self._chunks, self._visible_TL, strict=True):
            last = first + len(span.tokens)
            queries_HTD = queries_NKGD[first:last].flatten(1, 2).transpose(0, 1)
            keys_1KLD, values_1KLD = cache.rows(layer, slice(span.slot, span.slot + 1), span.stop)
            attended_1HTD = F.scaled_dot_product_attention(
                queries_HTD[None], keys_1KLD, values_1KLD, attn_mask=visible_TL, scale=1.0, enable_gqa=True
            )
            parts_KGD.append(attended_1HTD[0].transpose(0, 1).flatten(1))
            first = last
        return parts_KGD[0] if len(parts_KGD) == 1 else torch.cat(parts_KGD)


def _gigabytes(shape: Sequence[int], dtype: torch.dtype) -> float:
    return math.prod(shape) * dtype.itemsize / 1e9


def _rotate(heads_NHD: torch.Tensor, rotations_N1D: torch.Tensor) -> None:
    """Applies the rotary embedding in place; complex numbers exist in fp32 only."""
    pairs = torch.view_as_complex(heads_NHD.float().unflatten(-1, (-1, 2)))
    heads_NHD.copy_(torch.view_as_real(pairs * rotations_N1D).flatten(-2))


def _rotations(config: Any, shape: Shape, device: torch.device) -> torch.Tensor:
    """Rotation of each position and pair of head dimensions, complex [L, D / 2]."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        frequencies, scale = config.rope_parameters["rope_theta"] ** -exponents, 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    angles = torch.arange(shape.context, dtype=torch.float32)[:, None] * frequencies
    return torch.polar(torch.full_like(angles, scale), angles).to(device)


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            f"no config.json in {folder}", allowed="a model folder", next_step="ganymede artifacts list"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder / 'config.json'} is no model config: {error}") from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ArtifactError(f"no *.safetensors in {folder}", allowed="a model folder with safetensors weights")
    weights: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            weights.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CorruptArtifactError(
                f"{path} cannot be read: {error}", next_step="ganymede artifacts verify"
            ) from error
    return weights


class _Weights:
    """Tensors of a checkpoint by module name, fused and laid out for the forward pass."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tensors = tensors
        self._folder = folder
        self._to = {"dtype": dtype, "device": device}

    def __getitem__(self, module: str) -> torch.Tensor:
        """The weight of a module as it is in the file."""
        return self._raw(module).to(**self._to)

    def layer(self, prefix: str, shape: Shape) -> _Layer:
        """One transformer layer."""
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        query = self._interleaved(attention + "q_proj", shape.heads, shape.head_dim**-0.5)
        key = self._interleaved(attention + "k_proj", shape.kv_heads, 1.0)
        return _Layer(
            qkv=self._fused([query, key, self._pair(attention + "v_proj")]),
            out=self._fused([self._pair(attention + "o_proj")]),
            gate_up=self._fused([self._pair(mlp + "gate_proj"), self._pair(mlp + "up_proj")]),
            down=self._fused([self._pair(mlp + "down_proj")]),
            attention_norm=self[prefix + "input_layernorm"],
            mlp_norm=self[prefix + "post_attention_layernorm"],
        )

    def _raw(self, module: str) -> torch.Tensor:
        name = module + ".weight"
        if name not in self._tensors:
            raise CorruptArtifactError(
                f"{self._folder}: the weights hold no {name}", next_step="ganymede artifacts verify"
            )
        return self._tensors[name].float()

    def _pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = self._tensors.get(module + ".bias")
        return self._raw(module), None if bias is None else bias.float()

    def _interleaved(self, module: str, heads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of each head reordered from (first half, second half) to pairs, and scaled."""
        weight, bias = self._pair(module)

        def pairs(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) * scale

        return pairs(weight), None if bias is None else pairs(bias)

    def _fused(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> _Linear:
        weight = torch.cat([weight for weight, _ in parts]).to(**self._to)
        biases = [bias for _, bias in parts if bias is not None]
        return _Linear(weight.t().contiguous(), torch.cat(biases).to(**self._to) if biases else None)
