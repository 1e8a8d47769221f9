"""Where each token of a text looks: a model's attention, by layer and head.

The model runs through `transformers`' own modules with the attention that keeps its weights (`eager`), as the engine's
does not; its weights and tokenizer are opened as the engine opens them.
"""

# ruff: noqa: N815 - names end in the shape of their tensor: L layer, H head, Q query, K key

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoModel, AutoModelForSeq2SeqLM

from actors.engine.loading import runner_kind
from actors.engine.pretrained import load_modules
from actors.engine.seq2seq import Frame
from actors.text import Text
from configs.errors import ArtifactError, RequestError

AttentionKind = Literal["decoder", "encoder", "cross"]
MAX_TOKENS = 256
"""Longest text that is read; a picture of more has less than a pixel a token, and 12 x 12 heads of it are 38 MB."""
_OWN_ANSWER_TOKENS = 24


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """All maps of one kind: which keys each query's output is made of."""

    kind: AttentionKind
    """`decoder`: each token looks back; `encoder`: both ways; `cross`: a target's tokens look at the source."""
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    weights_LHQK: npt.NDArray[np.float32]
    """Adds up to 1 over K."""


class HeadSummary(BaseModel):
    """What one head does on this text, as shares of the attention, means over the queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    head: int
    first: float
    """On the first key, where heads rest that find nothing."""
    same: float | None
    """On the query's own position; None for cross-attention, where there is none."""
    previous: float | None
    """On the position before."""
    entropy_bits: float
    """0 where a query looks at one key."""


def read_attention(
    folder: Path, text: str, *, pair: str | None = None, target: str | None = None, chat: bool = False
) -> tuple[AttentionMaps, ...]:
    """The maps of a model reading a text.

    Args:
        folder: a model that the engine can run.
        text: what is read; the source of an encoder-decoder.
        pair: a second text, for encoders.
        target: what an encoder-decoder writes; what it would write by itself unless given.
        chat: whether a decoder gets the text as a user's message, by its chat template.

    Raises `RequestError` for a text that is empty or too long, or an option that the model has no use for, and what
    `runner_kind` and `load_modules` raise.
    """
    kind = runner_kind(folder)
    for name, given, fits in (("pair", pair, "encoder"), ("target", target, "seq2seq"), ("chat", chat, "decoder")):
        if given and kind != fits:
            raise RequestError(f"--{name} is for another kind of model", received=kind, allowed=fits)
    opened = Text.load(folder)
    if kind == "decoder":
        ids: Sequence[int] = opened.render_chat([{"role": "user", "content": text}]) if chat else opened.encode(text)
    else:
        ids = opened.encode_input(text, pair).token_ids
    _check_length("text", ids)
    if kind == "seq2seq":
        return _read_seq2seq(folder, opened, ids, target)
    model = _load(folder, AutoModel, optional=("pooler.",) if kind == "encoder" else ())
    inputs = {"input_ids": torch.tensor([list(ids)])}
    if pair is not None and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.tensor([list(opened.encode_input(text, pair).type_ids)])
    cache = {"use_cache": False} if kind == "decoder" else {}
    with torch.inference_mode():
        attentions = model(**inputs, **cache, output_attentions=True).attentions
    labels = _labels(opened, ids)
    return (AttentionMaps("decoder" if kind == "decoder" else "encoder", labels, labels, _stacked(folder, attentions)),)


def head_summaries(maps: AttentionMaps) -> list[HeadSummary]:
    """What each head does, layer by layer."""
    weights = maps.weights_LHQK.astype(np.float64)
    logs = np.log2(weights, out=np.zeros_like(weights), where=weights > 0)
    entropy = -(weights * logs).sum(-1).mean(-1)
    first = weights[..., 0].mean(-1)
    alike = maps.kind != "cross"
    same = np.diagonal(weights, axis1=2, axis2=3).mean(-1) if alike else None
    previous = (
        np.diagonal(weights, offset=-1, axis1=2, axis2=3).sum(-1) / max(1, weights.shape[2] - 1) if alike else None
    )
    return [
        HeadSummary(
            layer=layer,
            head=head,
            first=float(first[layer, head]),
            same=None if same is None else float(same[layer, head]),
            previous=None if previous is None else float(previous[layer, head]),
            entropy_bits=float(entropy[layer, head]),
        )
        for layer in range(weights.shape[0])
        for head in range(weights.shape[1])
    ]


def _read_seq2seq(folder: Path, text: Text, ids: Sequence[int], target: str | None) -> tuple[AttentionMaps, ...]:
    model = _load(folder, AutoModelForSeq2SeqLM)
    source = torch.tensor([list(ids)])
    start = Frame.of(model.generation_config, folder).start
    with torch.inference_mode():
        if target is not None:
            written = [*start, *text.encode_input(target).token_ids]
        else:
            answer = model.generate(input_ids=source, max_new_tokens=_OWN_ANSWER_TOKENS, do_sample=False, num_beams=1)
            written = answer[0].tolist()
        _check_length("target", written)
        output = model(
            input_ids=source, decoder_input_ids=torch.tensor([written]), use_cache=False, output_attentions=True
        )
    keys, queries = _labels(text, ids), _labels(text, written)
    return (
        AttentionMaps("encoder", keys, keys, _stacked(folder, output.encoder_attentions)),
        AttentionMaps("decoder", queries, queries, _stacked(folder, output.decoder_attentions)),
        AttentionMaps("cross", queries, keys, _stacked(folder, output.cross_attentions)),
    )


def _load(folder: Path, auto_class: Any, optional: Sequence[str] = ()) -> Any:
    """In fp32 on the processor: the maps of one text are no work, and every machine draws the same."""
    return load_modules(
        folder, auto_class, dtype=torch.float32, device=torch.device("cpu"), attention="eager", optional=optional
    )


def _stacked(folder: Path, attentions: Sequence[torch.Tensor | None] | None) -> npt.NDArray[np.float32]:
    layers = [layer for layer in attentions or () if layer is not None]
    if not layers:
        raise ArtifactError(
            f"the model in {folder} does not give its attention away", allowed="a model with softmax attention"
        )
    weights: npt.NDArray[np.float32] = torch.cat(layers).float().numpy()
    return weights


def _labels(text: Text, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(text.token_bytes(token).decode("utf-8", "replace") for token in ids)


def _check_length(what: str, ids: Sequence[int]) -> None:
    if not 0 < len(ids) <= MAX_TOKENS:
        raise RequestError(
            f"the {what} cannot be drawn", param=what, received=f"{len(ids)} tokens",
            allowed=f"1 to {MAX_TOKENS} tokens", next_step="give a part of it",
        )  # fmt: skip
