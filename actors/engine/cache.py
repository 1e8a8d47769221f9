"""Keys and values of every token seen, in rows of one width.

Shape suffixes: L layer, A keys/values (2), R row, K kv head, P position, D head dim, N token of a step.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.engine.kernels import kernels_for
from actors.engine.rows import Command, Copy, Layout
from configs.errors import EngineError


class KVCache:
    """Keys and values of `capacity` positions, seen as [layer, keys/values, row, kv head, position, head dim].

    Contiguous rows are what attention as batched matmuls over all decoding sequences runs fastest on. What was never
    written is 0: attention reads past a row's end and gives those positions the weight 0, and 0 times NaN is NaN.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises `EngineError` if the device has no memory for it."""
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self.dtype, self.device = dtype, device
        self._kernels = kernels_for(dtype, device)
        size = 2 * capacity * kv_heads * head_dim
        try:
            self._store = torch.zeros(layers, size, dtype=dtype, device=device)
        except RuntimeError as error:
            raise EngineError(
                "no memory for the cache of keys and values",
                received=f"{capacity} tokens, {layers * size * dtype.itemsize / 1e9:.1f} GB",
                next_step="lower cache_tokens or max_sequences",
            ) from error
        self.arrange(rows=1, width=capacity)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self._store.nbytes

    @property
    def view(self) -> torch.Tensor:
        """The memory as it is arranged, [layer, keys/values, row, kv head, position, head dim]."""
        return self._kv_LARKPD

    def arrange(self, *, rows: int, width: int) -> None:
        """Sees the memory as rows of `width` positions, whatever it holds."""
        shape = (len(self._store), 2, rows, self._kv_heads, width, self._head_dim)
        size = 2 * rows * width * self._kv_heads * self._head_dim
        self._kv_LARKPD = self._store[:, :size].view(shape)

    def obey(self, commands: Sequence[Command]) -> None:
        """Carries out the commands of `Rows`, in order."""
        for command in commands:
            if isinstance(command, Copy):
                rows = self._kv_LARKPD[..., : command.length, :]
                rows[:, :, command.target] = rows[:, :, command.source]
            elif isinstance(command, Layout):
                self._lay_out(command)
            else:
                for row, length in enumerate(command.lengths):
                    self._kv_LARKPD[:, :, row, :, length:] = 0
                self._kv_LARKPD[:, :, len(command.lengths) :] = 0

    def addresses(self, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Where `write` puts a step's tokens; the same in each layer."""
        rows, kv_heads, width = self._kv_LARKPD.shape[2:5]
        device = rows_N.device
        part_AK = torch.arange(2, device=device)[:, None] * rows * kv_heads + torch.arange(kv_heads, device=device)
        row_NAK = rows_N[:, None, None] * kv_heads + part_AK
        return (row_NAK * width + positions_N[:, None, None]).flatten()

    def write(self, layer: int, kv_NHD: torch.Tensor, addresses: torch.Tensor) -> None:
        """Stores a layer's keys and values; `kv_NHD` holds the key heads, then the value heads."""
        if self._kernels is not None:
            self._kernels.store(kv_NHD, self._kv_LARKPD[layer], addresses)
            return
        head_dim = kv_NHD.shape[-1]
        self._kv_LARKPD[layer].view(-1, head_dim).index_copy_(0, addresses, kv_NHD.reshape(-1, head_dim))

    def rows(self, layer: int, rows: slice, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `length` keys and values of some rows, each [row, kv head, position, head dim]."""
        keys_RKPD, values_RKPD = self._kv_LARKPD[layer, :, rows, :, :length]
        return keys_RKPD, values_RKPD

    def _lay_out(self, layout: Layout) -> None:
        """Goes layer by layer, so that what is held twice is one layer's part."""
        old_LARKPD = self._kv_LARKPD
        self.arrange(rows=layout.rows, width=layout.width)
        for old_ARKPD, new_ARKPD in zip(old_LARKPD, self._kv_LARKPD, strict=True):
            saved = [old_ARKPD[:, row, :, :length].clone() for row, length in layout.kept]
            for row, kept_AKPD in enumerate(saved):
                new_ARKPD[:, row, :, : kept_AKPD.shape[2]] = kept_AKPD
