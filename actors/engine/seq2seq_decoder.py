"""The decoder of encoder-decoder models, over the tokens of one engine step: the T5 and the BART shape.

The linear layers run once over all tokens of a step, whatever sequences they belong to, and so does attention by the
compiled kernel. Where there is none, attention runs over one block of the cache for all sequences that decode, and by
itself for each that has several tokens to run. Logits equal those of `transformers` up to rounding. Weights are taken
from its modules and laid out anew.

Shape suffixes: N token of the step, R row of a cache, T token of a row, L position in the cache, C hidden, H head,
D head dim, S token of a source, V vocabulary.
"""

# ruff: noqa: N803, N806, N815 - names end in the shape of their tensor

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from actors.engine.cache import KVCache
from actors.engine.kernels import kernels_for
from actors.engine.linear import Activation, Linear
from actors.engine.scheduler import Span
from actors.engine.sources import Source

_HIDDEN = float("-inf")

Norm = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One layer: self-attention, cross-attention and feed-forward, each with its norm."""

    qkv: Linear
    out: Linear
    attention_norm: Norm
    cross_query: Linear
    cross_out: Linear
    cross_norm: Norm
    up: Linear
    down: Linear
    mlp_norm: Norm


@dataclass(frozen=True)
class Shape:
    """What the forward pass needs to know beside the weights."""

    vocab: int
    layers: int
    heads: int
    head_dim: int
    pre_norm: bool
    """T5 normalises what goes into a sub-layer, BART what comes out."""
    gated: bool
    """Whether the first half of what `up` gives is a gate for the second."""
    activation: str


class Seq2SeqDecoder:
    """Weights and forward pass. Holds no state between calls; both caches are the caller's.

    The scores' scale is part of the query weights. Made by `seq2seq_weights`.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        layers: Sequence[Layer],
        cross: Linear,
        embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        norm: Norm,
        head: Linear,
        bias_HL: torch.Tensor,
    ) -> None:
        """
        Args:
            shape: of the model.
            layers: from the first to the last.
            cross: all layers' keys and values of a source, layer by layer, keys first.
            embed: hidden states [N, C] of tokens [N] at positions [N], contiguous and in memory of their own.
            norm: before the head.
            head: logits of hidden states.
            bias_HL: what a token that many positions back adds to a head's score; one row serves all heads.
        """
        self.shape = shape
        self._layers = layers
        self._cross = cross
        self._embed = embed
        self._norm = norm
        self._head = head
        # The last column is for what comes later than the token itself.
        self._bias_HL = F.pad(bias_HL, (0, 1), value=_HIDDEN)
        self._activate = Activation(shape.activation, gated=shape.gated, dtype=self.dtype, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and caches."""
        return self._cross.dtype

    @property
    def device(self) -> torch.device:
        """Where the forward pass runs."""
        return self._cross.device

    def read_sources(self, hidden_SC: torch.Tensor, sources: Sequence[Source], cross_cache: KVCache) -> None:
        """Stores what the encoder made of some sources, one after the other, as keys and values of every layer."""
        shape = self.shape
        rows = [source.row for source in sources for _ in source.tokens]
        positions = [position for source in sources for position in range(len(source.tokens))]
        addresses = cross_cache.addresses(*torch.tensor([rows, positions], device=self.device))
        kv_SLHD = self._cross(hidden_SC).view(len(hidden_SC), shape.layers, 2 * shape.heads, shape.head_dim)
        for layer in range(shape.layers):
            cross_cache.write(layer, kv_SLHD[:, layer], addresses)

    def forward(
        self, spans: Sequence[Span], sources: Sequence[Source], cache: KVCache, cross_cache: KVCache
    ) -> torch.Tensor:
        """Runs the spans' tokens and stores their keys and values; returns the last hidden states [N, C].

        Each sequence's earlier tokens must be in the cache and its source, at the same place in `sources`, in the
        cross-attention's; spans of one token come first.
        """
        shape = self.shape
        step = _Step(spans, sources, self._bias_HL)
        addresses = cache.addresses(step.rows_N, step.positions_N)
        x_NC = self._embed(step.tokens_N, step.positions_N)
        for index, layer in enumerate(self._layers):
            heads_NHD = layer.qkv(self._before(layer.attention_norm, x_NC)).view(len(x_NC), -1, shape.head_dim)
            cache.write(index, heads_NHD[:, shape.heads :], addresses)
            attended_NC = step.attend(heads_NHD[:, : shape.heads], cache, index)
            x_NC = self._added(x_NC, layer.out, attended_NC, layer.attention_norm)
            queries_NC = layer.cross_query(self._before(layer.cross_norm, x_NC))
            attended_NC = step.attend_source(queries_NC.unflatten(1, (shape.heads, -1)), cross_cache, index)
            x_NC = self._added(x_NC, layer.cross_out, attended_NC, layer.cross_norm)
            up_NI = self._activate(layer.up(self._before(layer.mlp_norm, x_NC)))
            x_NC = self._added(x_NC, layer.down, up_NI, layer.mlp_norm)
        return x_NC

    def logits(self, hidden_NC: torch.Tensor) -> torch.Tensor:
        """fp32 logits [N, V] of hidden states."""
        return self._head(self._norm(hidden_NC)).float()

    def _before(self, norm: Norm, x_NC: torch.Tensor) -> torch.Tensor:
        return norm(x_NC) if self.shape.pre_norm else x_NC

    def _added(self, x_NC: torch.Tensor, linear: Linear, part_NX: torch.Tensor, norm: Norm) -> torch.Tensor:
        """`x_NC`, which is overwritten, plus what a sub-layer's last product makes of `part_NX`."""
        linear.add_to(x_NC, part_NX)
        return x_NC if self.shape.pre_norm else norm(x_NC)


@dataclass(frozen=True)
class _Block:
    """Tokens that attend together: one or more for each of some consecutive rows of a cache."""

    tokens: slice
    rows: slice
    length: int
    bias_RHTL: torch.Tensor
    scatter_N: torch.Tensor | None
    """Which of the rows each token attends over, where that is not one token a row, in order."""

    def attend(self, queries_NHD: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        """[token, H * D]."""
        queries_NHD = queries_NHD[self.tokens]
        count = self.rows.stop - self.rows.start
        if self.scatter_N is not None:
            spread_RHD = queries_NHD.new_zeros(count, *queries_NHD.shape[1:])
            queries_RTHD = spread_RHD.index_copy_(0, self.scatter_N, queries_NHD)[:, None]
        else:
            queries_RTHD = queries_NHD.unflatten(0, (count, -1))
        keys_RHLD, values_RHLD = cache.rows(layer, self.rows, self.length)
        scores_RHTL = queries_RTHD.transpose(1, 2) @ keys_RHLD.transpose(-1, -2)
        attended_RHTD = (scores_RHTL + self.bias_RHTL).softmax(-1) @ values_RHLD
        attended_NC = attended_RHTD.transpose(1, 2).flatten(2).flatten(0, 1)
        return attended_NC if self.scatter_N is None else attended_NC[self.scatter_N]


class _Step:
    """The tensors that all layers share in one step, and attention over them."""

    def __init__(self, spans: Sequence[Span], sources: Sequence[Source], bias_HL: torch.Tensor) -> None:
        tokens = [token for span in spans for token in span.tokens]
        positions = [position for span in spans for position in range(span.start, span.stop)]
        rows = [span.row for span in spans for _ in span.tokens]
        self.tokens_N, self.positions_N, self.rows_N = torch.tensor([tokens, positions, rows], device=bias_HL.device)
        self._kernels = kernels_for(bias_HL.dtype, bias_HL.device)
        if self._kernels is None:
            self._set_blocks(spans, sources, bias_HL)
            return
        of_tokens = [source for span, source in zip(spans, sources, strict=True) for _ in span.tokens]
        source_rows, lengths = [source.row for source in of_tokens], [len(source.tokens) for source in of_tokens]
        self._bias_HL = bias_HL
        self._own_places = self.rows_N, self.positions_N + 1, max(positions) + 1
        self._source_places = torch.tensor(source_rows), torch.tensor(lengths), max(lengths)

    def attend(self, queries_NHD: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        """Attention of each token over its own sequence up to itself; [N, H * D]."""
        if self._kernels is None:
            return _joined([block.attend(queries_NHD, cache, layer) for block in self._own])
        cached = cache.rows(layer, slice(None), self._own_places[2])
        bias_HL = self._bias_HL.expand(queries_NHD.shape[1], -1)
        return self._kernels.attend(queries_NHD, *cached, *self._own_places, bias_HL=bias_HL)

    def attend_source(self, queries_NHD: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        """Attention of each token over its sequence's source; [N, H * D]."""
        if self._kernels is None:
            return _joined([block.attend(queries_NHD, cache, layer) for block in self._cross])
        cached = cache.rows(layer, slice(None), self._source_places[2])
        return self._kernels.attend(queries_NHD, *cached, *self._source_places)

    def _set_blocks(self, spans: Sequence[Span], sources: Sequence[Source], bias_HL: torch.Tensor) -> None:
        decoding = next((n for n, s in enumerate(spans) if len(s.tokens) > 1), len(spans))
        self._own: list[_Block] = []
        self._cross: list[_Block] = []
        if decoding:
            tokens = slice(0, decoding)
            self._own.append(_own_block(spans[:decoding], tokens, self.positions_N, bias_HL))
            self._cross.append(_source_block(sources[:decoding], tokens, bias_HL))
        first = decoding
        for span, source in zip(spans[decoding:], sources[decoding:], strict=True):
            tokens = slice(first, first + len(span.tokens))
            self._own.append(_own_block([span], tokens, self.positions_N, bias_HL))
            self._cross.append(_source_block([source], tokens, bias_HL))
            first = tokens.stop


def _own_block(spans: Sequence[Span], tokens: slice, positions_N: torch.Tensor, bias_HL: torch.Tensor) -> _Block:
    rows, scatter_N = _placed([span.row for span in spans], bias_HL.device)
    length = max(span.stop for span in spans)
    back_NL = positions_N[tokens, None] - torch.arange(length, device=bias_HL.device)
    bias_NHL = bias_HL[:, back_NL.clamp(min=-1)].transpose(0, 1)
    if scatter_N is not None:
        spread = bias_NHL.new_zeros(rows.stop - rows.start, *bias_NHL.shape[1:])
        bias_NHL = spread.index_copy_(0, scatter_N, bias_NHL)
    count = rows.stop - rows.start
    return _Block(tokens, rows, length, bias_NHL.unflatten(0, (count, -1)).transpose(1, 2), scatter_N)


def _source_block(sources: Sequence[Source], tokens: slice, bias_HL: torch.Tensor) -> _Block:
    rows, scatter_N = _placed([source.row for source in sources], bias_HL.device)
    lengths = [1] * (rows.stop - rows.start)
    for source in sources:
        lengths[source.row - rows.start] = len(source.tokens)
    past_RL = torch.arange(max(lengths), device=bias_HL.device) >= torch.tensor(lengths, device=bias_HL.device)[:, None]
    bias_RL = torch.zeros(past_RL.shape, dtype=bias_HL.dtype, device=bias_HL.device).masked_fill_(past_RL, _HIDDEN)
    return _Block(tokens, rows, max(lengths), bias_RL[:, None, None], scatter_N)


def _placed(rows: Sequence[int], device: torch.device) -> tuple[slice, torch.Tensor | None]:
    """The block of rows that holds all of `rows`; which of them each is, unless that is all of them in order."""
    block = slice(min(rows), max(rows) + 1)
    if list(rows) == list(range(block.start, block.stop)):
        return block, None
    return block, torch.tensor([row - block.start for row in rows], device=device)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
