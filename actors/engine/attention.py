"""Attention of one step's tokens over the cache, for any decoder.

Decoding sequences attend together: by the compiled kernel where there is one, which reads no more than each of them
holds, and else by two batched matmuls and a softmax over one block of the cache's rows, which on a CPU is nine times as
fast as torch's fused kernel with its one query row. Chunks of prompts attend one sequence at a time.

Shape suffixes: N token of the step, B decoding sequence, R row of the block, T token of a chunk, L position in the
cache, H query head, K key/value head, G query heads a kv head, D head dim.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from actors.engine.cache import KVCache
from actors.engine.kernels import kernels_for
from actors.engine.scheduler import Span


class StepAttention:
    """The tensors that all layers share in one step, and attention.

    The spans of one token come first, in order of row. Each token sees its own sequence up to itself, or the last
    `window` positions of that.
    """

    def __init__(self, spans: Sequence[Span], cache: KVCache, device: torch.device) -> None:
        tokens = [token for span in spans for token in span.tokens]
        positions = [position for span in spans for position in range(span.start, span.stop)]
        rows = [span.row for span in spans for _ in span.tokens]
        self.tokens_N, self.positions_N, rows_N = torch.tensor([tokens, positions, rows], device=device)
        self._cache = cache
        self._addresses = cache.addresses(rows_N, self.positions_N)
        count = next((n for n, span in enumerate(spans) if len(span.tokens) > 1), len(spans))
        self._decoding = count
        self._chunks = spans[count:]
        self._block = spans[count - 1].row + 1 if count else 0
        self._longest = max((span.stop for span in spans[:count]), default=0)
        # Rows of the block that do not decode in this step get queries of 0 and results that nobody reads.
        self._rows_B = None if self._block == count else rows_N[:count]
        self._places_N = rows_N[:count], self.positions_N[:count] + 1
        self._kernels = kernels_for(cache.dtype, device)
        self._masks: dict[int | None, torch.Tensor] = {}
        self._chunk_masks: dict[int | None, list[torch.Tensor]] = {}

    def store(self, layer: int, kv_NHD: torch.Tensor) -> None:
        """Puts the tokens' keys (the first heads) and values in the cache; to be done before a layer attends."""
        self._cache.write(layer, kv_NHD, self._addresses)

    def attend(
        self,
        layer: int,
        queries_NKGD: torch.Tensor,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """What each token gets from the values, [N, H * D]. `softcap` bounds the scores by a tanh."""
        first = self._decoding
        parts = [self._decode(layer, queries_NKGD[:first], scale, softcap, window)] if first else []
        hidden_TL = self._hidden_from_chunks(window) if self._chunks else []
        for span, hidden in zip(self._chunks, hidden_TL, strict=True):
            last = first + len(span.tokens)
            keys_1KLD, values_1KLD = self._cache.rows(layer, slice(span.row, span.row + 1), span.stop)
            queries_NKGD_chunk = queries_NKGD[first:last]
            parts.append(_attend_chunk(queries_NKGD_chunk, keys_1KLD, values_1KLD, hidden, scale, softcap))
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self, layer: int, queries_BKGD: torch.Tensor, scale: float, softcap: float | None, window: int | None
    ) -> torch.Tensor:
        keys_RKLD, values_RKLD = self._cache.rows(layer, slice(self._block), self._longest)
        if self._kernels is not None and softcap is None and window is None:
            queries_BHD = queries_BKGD.flatten(1, 2)
            return self._kernels.attend(
                queries_BHD, keys_RKLD, values_RKLD, *self._places_N, self._longest, scale=scale
            )
        scores_RKGL = self._spread(queries_BKGD) @ keys_RKLD.transpose(-1, -2)
        weights_RKGL = _weights(scores_RKGL, self._hidden(window), scale, softcap)
        attended_RX = (weights_RKGL @ values_RKLD).flatten(1)
        return attended_RX if self._rows_B is None else attended_RX[self._rows_B]

    def _spread(self, queries_BKGD: torch.Tensor) -> torch.Tensor:
        if self._rows_B is None:
            return queries_BKGD
        queries_RKGD = queries_BKGD.new_zeros(self._block, *queries_BKGD.shape[1:])
        return queries_RKGD.index_copy_(0, self._rows_B, queries_BKGD)

    def _hidden(self, window: int | None) -> torch.Tensor:
        """Mask of the decoding block [R, 1, 1, L], True for what is not to be seen."""
        if window not in self._masks:
            latest_R = self.positions_N[: self._decoding]
            if self._rows_B is not None:
                latest_R = latest_R.new_full((self._block,), self._longest).index_copy_(0, self._rows_B, latest_R)
            positions_L = torch.arange(self._longest, device=latest_R.device)
            self._masks[window] = _outside(positions_L, latest_R[:, None], window)[:, None, None]
        return self._masks[window]

    def _hidden_from_chunks(self, window: int | None) -> list[torch.Tensor]:
        """The mask [T, L] of each chunk."""
        if window not in self._chunk_masks:
            device = self.positions_N.device
            self._chunk_masks[window] = [
                _outside(
                    torch.arange(span.stop, device=device),
                    torch.arange(span.start, span.stop, device=device)[:, None],
                    window,
                )
                for span in self._chunks
            ]
        return self._chunk_masks[window]


def _outside(positions_L: torch.Tensor, latest: torch.Tensor, window: int | None) -> torch.Tensor:
    future = positions_L > latest
    return future if window is None else future.logical_or_(positions_L <= latest - window)


def _weights(scores: torch.Tensor, hidden: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    if scale != 1:
        scores.mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1)


def _attend_chunk(
    queries_TKGD: torch.Tensor,
    keys_1KLD: torch.Tensor,
    values_1KLD: torch.Tensor,
    hidden_TL: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one sequence's chunk, [T, H * D]."""
    if softcap is not None:
        queries_KGTD = queries_TKGD.permute(1, 2, 0, 3)
        scores_KGTL = queries_KGTD @ keys_1KLD[0, :, None].transpose(-1, -2)
        attended_KGTD = _weights(scores_KGTL, hidden_TL, scale, softcap) @ values_1KLD[0, :, None]
        return attended_KGTD.permute(2, 0, 1, 3).flatten(1)
    queries_HTD = queries_TKGD.flatten(1, 2).transpose(0, 1)
    attended_1HTD = F.scaled_dot_product_attention(
        queries_HTD[None], keys_1KLD, values_1KLD, attn_mask=~hidden_TL, scale=scale, enable_gqa=True
    )
    return attended_1HTD[0].transpose(0, 1).flatten(1)
