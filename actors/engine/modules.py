"""Any decoder-only model of `transformers` through its own modules, with attention over the engine's cache.

The modules compute everything but attention, which they take from `AttentionInterface`; positions go in, no mask is
built. A model is opened only if its logits over the cache, in pieces, equal those of its own plain forward pass: what
keeps state of another kind (recurrent layers), or needs masks of its own (ALiBi, sinks, chunked windows), is refused.

Shape suffixes: N token of the step, H query head, K key/value head, G query heads a kv head, D head dim, V vocabulary.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch

from actors.engine.attention import StepAttention
from actors.engine.cache import KVCache
from actors.engine.decoder import LeanDecoder, obstacle
from actors.engine.kernels import kernels_for
from actors.engine.linear import pack
from actors.engine.pretrained import Precision, load_modules, read_config, refuse_int8
from actors.engine.recurrent_decoder import RecurrentDecoder
from actors.engine.scheduler import Span
from configs.errors import ArtifactError

DecoderKind = Literal["lean", "modules", "recurrent"]
DecoderChoice = Literal["auto", "lean", "modules"]

_NAME = "ganymede"
"""Of the attention, in `AttentionInterface`."""
_PROBE_TOKENS = 24
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference to the plain forward pass, as a share of the largest logit."""

_log = logging.getLogger(__name__)
_step: ContextVar[StepAttention | _Probe] = ContextVar("step")


class Decoder(Protocol):
    """A model's forward pass over the tokens of a step."""

    kind: DecoderKind
    """Which one this is."""

    @property
    def vocab(self) -> int:
        """Token ids run below this."""
        ...

    @property
    def context(self) -> int:
        """Most tokens of a sequence."""
        ...

    def new_cache(self, tokens: int) -> KVCache:
        """An empty cache for this model. Raises `EngineError` if the device has no memory for it."""
        ...

    def run(self, spans: Sequence[Span], cache: KVCache, wanted: Sequence[int]) -> torch.Tensor:
        """Runs the spans' tokens and stores their keys and values; fp32 logits [W, V] of the wanted tokens.

        Args:
            spans: those of one token first, in order of row; each sequence's earlier tokens are in the cache.
            cache: made by `new_cache`.
            wanted: numbers of tokens of the step, the first span's first token being 0.
        """
        ...


def load_decoder(
    folder: Path, choice: DecoderChoice, *, dtype: torch.dtype, device: torch.device, precision: Precision = "auto"
) -> Decoder:
    """Opens a model folder; `auto` takes the lean decoder if `obstacle` finds none, and the model's modules otherwise.

    The LSTM baseline has a decoder of its own, whatever is chosen.

    Raises `ArtifactError` if the model is not supported or files are missing, `CorruptArtifactError` if the weights
    cannot be read or are not all there.
    """
    config = read_config(folder)
    if config.model_type == RecurrentDecoder.MODEL_TYPE:
        refuse_int8(precision, folder, "an LSTM")
        return RecurrentDecoder.load(folder, dtype=dtype, device=device)
    reason = obstacle(config) if choice == "auto" else None
    if choice == "modules" or reason is not None:
        refuse_int8(precision, folder, f"it runs through its own modules: {reason or 'asked for'}")
        _log.info("%s runs through its own modules: %s", folder, reason or "asked for")
        return ModulesDecoder.load(folder, dtype=dtype, device=device)
    if kernels_for(dtype, device) is None:
        refuse_int8(precision, folder, f"no compiled kernels on {device.type}")
    _log.info("%s runs on the lean decoder", folder)
    return LeanDecoder.load(folder, dtype=dtype, device=device, int8=precision == "int8")


class ModulesDecoder:
    """A `transformers` model and its forward pass over a cache. Holds no state between calls."""

    def __init__(self, model: Any, *, kv_heads: int, head_dim: int) -> None:
        self.kind: DecoderKind = "modules"
        self._model = model
        config = model.config.get_text_config(decoder=True)
        self.vocab = config.vocab_size
        self.context = config.max_position_embeddings
        self._layers = config.num_hidden_layers
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Opens a model folder. Raises what `load_decoder` does."""
        from transformers import AutoModelForCausalLM

        _register()
        model = load_modules(folder, AutoModelForCausalLM, dtype=dtype, device=device, attention="eager")
        tokens = [(7 * n) % model.config.get_text_config(decoder=True).vocab_size for n in range(_PROBE_TOKENS)]
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0].float()
            probe = _Probe()
            try:
                model.set_attn_implementation(_NAME)
                with _using(probe):
                    model(input_ids=torch.tensor([tokens], device=device), use_cache=False)
            except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError) as error:
                raise _unsupported(folder, f"its attention cannot be replaced: {error}") from error
            decoder = cls(model, **probe.geometry(folder, model))
            pack(model)
            difference = decoder._difference(tokens, expected)
        if not difference <= _TOLERANCE[dtype]:
            raise _unsupported(
                folder, f"logits over the cache differ from the model's own by {difference:.2g} of the largest"
            )
        return decoder

    def new_cache(self, tokens: int) -> KVCache:
        """An empty cache for this model. Raises `EngineError` if the device has no memory for it."""
        return KVCache(
            layers=self._layers, kv_heads=self._kv_heads, head_dim=self._head_dim, capacity=tokens,
            dtype=self._model.dtype, device=self._model.device,
        )  # fmt: skip

    def run(self, spans: Sequence[Span], cache: KVCache, wanted: Sequence[int]) -> torch.Tensor:
        """See `Decoder.run`."""
        step = StepAttention(spans, cache, self._model.device)
        rows = torch.tensor(wanted, dtype=torch.long, device=self._model.device)
        keep = {"logits_to_keep": rows} if self._keeps else {}
        with _using(step):
            logits_1NV = self._model(
                input_ids=step.tokens_N[None], position_ids=step.positions_N[None], use_cache=False, **keep
            ).logits
        return (logits_1NV[0] if self._keeps else logits_1NV[0][rows]).float()

    def _difference(self, tokens: list[int], expected_NV: torch.Tensor) -> float:
        """How far a prompt run in pieces, beside another one, is from its plain forward pass."""
        cache = self.new_cache(4 * _PROBE_TOKENS)
        cache.arrange(rows=4, width=_PROBE_TOKENS)
        cuts = (0, 9, 10, 11, 20, len(tokens))
        got = []
        for start, stop in pairwise(cuts):
            mine = Span(1, start, tokens[start:stop])
            other = Span(3, start // 2, tokens[start // 2 : start // 2 + 2])
            got.append(self.run([mine, other], cache, range(stop - start)))
        return float((torch.cat(got) - expected_NV).abs().max() / expected_NV.abs().max())


class _Probe:
    """Attention of a plain forward pass, to learn what a model asks of it."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.odd: str | None = None

    def note(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Records a layer's shapes; what it returns has the right shape and no meaning."""
        if layer in self.shapes:
            self.odd = "a layer attends more than once"
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            self.odd = "keys and values differ in shape"
        self.shapes[layer] = (key.shape[1], key.shape[3])
        return query.transpose(1, 2)

    def geometry(self, folder: Path, model: Any) -> dict[str, int]:
        """Key/value heads and their size, if they are the same in every layer."""
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if set(self.shapes) != set(range(layers)):
            raise _unsupported(folder, f"{len(self.shapes)} of its {layers} layers attend")
        if len(set(self.shapes.values())) > 1:
            raise _unsupported(folder, "its layers differ in the shape of keys")
        if self.odd is not None:
            raise _unsupported(folder, self.odd)
        kv_heads, head_dim = self.shapes[0]
        return {"kv_heads": kv_heads, "head_dim": head_dim}


def _attend(
    module: torch.nn.Module,
    query_1HND: torch.Tensor,
    key_1KND: torch.Tensor,
    value_1KND: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The signature of `AttentionInterface`; attention over the cache of the step in progress."""
    step = _step.get()
    layer = int(module.layer_idx)
    if isinstance(step, _Probe):
        return step.note(layer, query_1HND, key_1KND, value_1KND), None
    head_dim = query_1HND.shape[-1]
    step.store(layer, torch.cat([key_1KND[0], value_1KND[0]]).transpose(0, 1))
    queries_NKGD = query_1HND[0].unflatten(0, (key_1KND.shape[1], -1)).permute(2, 0, 1, 3)
    attended_NX = step.attend(
        layer,
        queries_NKGD,
        scale=head_dim**-0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
    )
    return attended_NX.view(1, len(attended_NX), -1, head_dim), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The signature of `AttentionMaskInterface`; `StepAttention` knows what is hidden."""


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _no_mask)


@contextmanager
def _using(step: StepAttention | _Probe) -> Iterator[None]:
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def _unsupported(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"the model in {folder} is not supported by the engine",
        received=reason,
        allowed="decoder-only models whose layers all attend to a cache of keys and values",
        next_step="run this model with transformers",
    )
