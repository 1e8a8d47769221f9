"""Keys and values of every token seen, one row of positions for each slot.

Shape suffixes: L layer, A keys/values (2), S slot, K kv head, P position, D head dim, N token of
a step.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

import torch

from actors.engine.scheduler import Move


class KVCache:
    """Keys and values in one tensor [layer, keys/values, slot, kv_head, position, head_dim].

    The tensor has to come zeroed, not merely allocated: attention reads past a row's end and gives those positions the
    weight 0, and 0 times a leftover NaN would be NaN.
    """

    def __init__(self, kv_LASKPD: torch.Tensor) -> None:
        self._kv_LASKPD = kv_LASKPD

    def addresses(self, slots_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Where `write` puts a step's tokens; the same in each layer."""
        slots, kv_heads, positions = self._kv_LASKPD.shape[2:5]
        device = slots_N.device
        part_AK = torch.arange(2, device=device)[:, None] * slots * kv_heads + torch.arange(kv_heads, device=device)
        row_NAK = slots_N[:, None, None] * kv_heads + part_AK
        return (row_NAK * positions + positions_N[:, None, None]).flatten()

    def write(self, layer: int, kv_NHD: torch.Tensor, addresses: torch.Tensor) -> None:
        """Stores a layer's keys and values; `kv_NHD` holds the key heads, then the value heads."""
        head_dim = kv_NHD.shape[-1]
        self._kv_LASKPD[layer].view(-1, head_dim).index_copy_(0, addresses, kv_NHD.reshape(-1, head_dim))

    def rows(self, layer: int, slots: slice, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `length` keys and values of some slots, each [slot, kv_head, position, head_dim]."""
        keys_SKPD, values_SKPD = self._kv_LASKPD[layer, :, slots, :, :length]
        return keys_SKPD, values_SKPD

    def move(self, move: Move) -> None:
        """Copies the start of one slot's row to another slot."""
        rows = self._kv_LASKPD[..., : move.length, :]
        rows[:, :, move.target] = rows[:, :, move.source]

    def clear(self, slot: int) -> None:
        """Zeroes a slot."""
        self._kv_LASKPD[:, :, slot] = 0
