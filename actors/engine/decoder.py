"""The forward pass of Llama-shaped decoders (Llama, Mistral, Qwen2, Qwen3) over the tokens of one engine step.

Weights are read from `config.json` and safetensors files as `transformers` writes them. The linear layers run once
over all tokens of a step, whatever sequences they belong to. Logits equal those of `transformers` up to rounding.
Other architectures run through their own modules, see `modules`; `obstacle` is the rule.

Shape suffixes: N token of the step, L position, C hidden, I intermediate, H query head, K key/value head, G query
heads a kv head, D head dim, V vocabulary.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from actors.engine.adapters import adapted
from actors.engine.attention import StepAttention
from actors.engine.cache import KVCache
from actors.engine.compiled_step import CompiledStep, LayerWeights
from actors.engine.kernels import kernels_for
from actors.engine.linear import Linear, RmsNorm
from actors.engine.pretrained import read_config
from actors.engine.scheduler import Span
from configs.errors import ArtifactError, CorruptArtifactError

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not change with the length of the sequence."""


def obstacle(config: Any) -> str | None:
    """Why this forward pass cannot run a model; None if it can."""
    rope = getattr(config, "rope_parameters", None) or {}
    for key, value, allowed in (
        ("model_type", config.model_type, _MODEL_TYPES),
        ("hidden_act", getattr(config, "hidden_act", None), ("silu",)),
        ("rope_type", rope.get("rope_type"), _STATIC_ROPE),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
    ):
        if value not in allowed:
            return f"{key} is {value}"
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ("full_attention" if window is None else "sliding_attention",)
    if set(layers) != {"full_attention"} and not (window and window >= config.max_position_embeddings):
        return f"sliding_window is {window}"
    return None


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Of the MLP."""
    context: int
    norm_epsilon: float

    @classmethod
    def of(cls, config: Any) -> Self:
        """Reads a `transformers` config."""
        return cls(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            inner=config.intermediate_size,
            context=config.max_position_embeddings,
            norm_epsilon=config.rms_norm_eps,
        )


class LeanDecoder:
    """A Llama-shaped model's weights and forward pass. Holds no state between calls; the cache is the caller's.

    Query and key weights are stored with each head's two halves interleaved, so that a rotary embedding is one
    complex product; attention scores do not change by that. The scores' scale is part of the query weights, or of
    the weights of the queries' norm.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        embedding: torch.Tensor | None,
        layers: Sequence[LayerWeights],
        norm: RmsNorm,
        head: Linear,
        rotations_LD: torch.Tensor,
    ) -> None:
        self.kind: Literal["lean", "modules", "recurrent"] = "lean"
        self.shape = shape
        self.vocab = shape.vocab
        self.context = shape.context
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rotations_LD = rotations_LD
        kernels = kernels_for(head.dtype, head.device)
        self._compiled = None if kernels is None else CompiledStep(
            kernels, embedding_VC=embedding, layers=layers, norm=norm, head=head, rotations_LD=rotations_LD,
            heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: torch.device, int8: bool = False) -> Self:
        """Opens a model folder; with `int8`, for which there must be compiled kernels, its linear layers' weights are
        rounded to that.

        Raises `ArtifactError` if files are missing or the architecture is another, `CorruptArtifactError` if
        a weights file cannot be read.
        """
        config = read_config(folder)
        reason = obstacle(config)
        if reason is not None:
            raise ArtifactError(
                f"{folder / 'config.json'}: the lean decoder cannot run this model", received=reason,
                next_step="use the decoder `modules`, or `auto`",
            )  # fmt: skip
        shape = Shape.of(config)
        weights = _Weights(_read_weights(folder), folder, dtype, device, int8=int8)
        embedding = weights["model.embed_tokens"]
        tied = config.tie_word_embeddings
        return cls(
            shape,
            # Tied weights are held once, in the layout that the head's product runs fastest with.
            embedding=None if tied else embedding,
            layers=[weights.layer(f"model.layers.{n}.", shape) for n in range(shape.layers)],
            norm=weights.norm("model.norm", shape),
            head=Linear(embedding if tied else weights["lm_head"], None, int8=int8),
            rotations_LD=_rotations(config, shape, device),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._head.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._head.device

    @property
    def scales_queries(self) -> bool:
        """Whether the scale of attention's scores is part of the query weights."""
        return self._layers[0].head_norm is None

    def new_cache(self, tokens: int) -> KVCache:
        """An empty cache for this model. Raises `EngineError` if the device has no memory for it."""
        shape = self.shape
        return KVCache(
            layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim, capacity=tokens,
            dtype=self._head.dtype, device=self._head.device,
        )  # fmt: skip

    def run(self, spans: Sequence[Span], cache: KVCache, wanted: Sequence[int]) -> torch.Tensor:
        """Runs the spans' tokens and stores their keys and values; fp32 logits [W, V] of the wanted tokens.

        Args:
            spans: those of one token first, in order of row; each sequence's earlier tokens are in the cache.
            cache: made by `new_cache`.
            wanted: numbers of tokens of the step, the first span's first token being 0.
        """
        device = self._head.device
        layers = adapted(self._layers, spans, device)
        if self._compiled is not None and layers is self._layers:
            return self._compiled.run(spans, cache, wanted)
        hidden_NC = self._hidden(StepAttention(spans, cache, device), layers)
        hidden_WC = hidden_NC if len(wanted) == len(hidden_NC) else hidden_NC[list(wanted)]
        return self._head(self._norm(hidden_WC)).float()

    def _hidden(self, step: StepAttention, layers: Sequence[LayerWeights]) -> torch.Tensor:
        shape = self.shape
        scored = shape.heads + shape.kv_heads
        rotations_N1D = self._rotations_LD[step.positions_N][:, None]
        residual_NC = self._embed(step.tokens_N)
        for index, layer in enumerate(layers):
            x_NC = layer.attention_norm(residual_NC)
            heads_NHD = layer.qkv(x_NC).view(len(x_NC), -1, shape.head_dim)
            if layer.head_norm is not None:
                normed_NHD = F.rms_norm(heads_NHD[:, :scored], (shape.head_dim,), None, shape.norm_epsilon)
                torch.mul(normed_NHD, layer.head_norm, out=heads_NHD[:, :scored])
            _rotate(heads_NHD[:, :scored], rotations_N1D)
            step.store(index, heads_NHD[:, shape.heads :])
            queries_NKGD = heads_NHD[:, : shape.heads].unflatten(1, (shape.kv_heads, -1))
            layer.out.add_to(residual_NC, step.attend(index, queries_NKGD))
            gate_NI, up_NI = layer.gate_up(layer.mlp_norm(residual_NC)).chunk(2, dim=-1)
            layer.down.add_to(residual_NC, F.silu(gate_NI) * up_NI)
        return residual_NC

    def _embed(self, tokens_N: torch.Tensor) -> torch.Tensor:
        return self._head.rows(tokens_N) if self._embedding is None else F.embedding(tokens_N, self._embedding)


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
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    angles = torch.arange(shape.context, dtype=torch.float32)[:, None] * frequencies
    return torch.polar(torch.full_like(angles, scale), angles).to(device)


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


def in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head reordered from (first half, second half) to pairs."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class _Weights:
    """Tensors of a checkpoint by module name, fused and laid out for the forward pass."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        int8: bool,
    ) -> None:
        self._tensors = tensors
        self._folder = folder
        self._to: dict[str, Any] = {"dtype": dtype, "device": device}
        self._linear: dict[str, Any] = self._to | {"int8": int8}

    def __getitem__(self, module: str) -> torch.Tensor:
        """The weight of a module as it is in the file."""
        return self._raw(module).to(**self._to)

    def norm(self, module: str, shape: Shape) -> RmsNorm:
        """A norm of hidden states."""
        return RmsNorm(self[module], shape.norm_epsilon)

    def layer(self, prefix: str, shape: Shape) -> LayerWeights:
        """One transformer layer."""
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        head_norm = self._head_norm(attention, shape)
        query = self._interleaved(attention + "q_proj", shape.heads, shape.head_dim**-0.5 if head_norm is None else 1.0)
        key = self._interleaved(attention + "k_proj", shape.kv_heads, 1.0)
        return LayerWeights(
            qkv=Linear.of([query, key, self._pair(attention + "v_proj")], **self._linear),
            out=Linear.of([self._pair(attention + "o_proj")], **self._linear),
            gate_up=Linear.of([self._pair(mlp + "gate_proj"), self._pair(mlp + "up_proj")], **self._linear),
            down=Linear.of([self._pair(mlp + "down_proj")], **self._linear),
            attention_norm=self.norm(prefix + "input_layernorm", shape),
            mlp_norm=self.norm(prefix + "post_attention_layernorm", shape),
            head_norm=head_norm,
        )

    def _head_norm(self, attention: str, shape: Shape) -> torch.Tensor | None:
        if attention + "q_norm.weight" not in self._tensors:
            return None
        query_D = in_pairs(self._raw(attention + "q_norm"), 1) * shape.head_dim**-0.5
        key_D = in_pairs(self._raw(attention + "k_norm"), 1)
        return torch.cat([query_D.expand(shape.heads, -1), key_D.expand(shape.kv_heads, -1)]).to(**self._to)

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
        """Weight and bias in pairs, and scaled."""
        weight, bias = self._pair(module)
        return in_pairs(weight, heads) * scale, None if bias is None else in_pairs(bias, heads) * scale
