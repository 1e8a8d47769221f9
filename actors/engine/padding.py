"""Inputs of unlike length as one batch for an encoder's own modules."""

# ruff: noqa: N806 - names end in the shape of their tensor: B input, T token

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> torch.Tensor:
    """Rows filled up on the right to the longest one's length, [B, T]."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *([fill] * (longest - len(row)))] for row in rows], device=device)


def present(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Where `padded` has the rows' own tokens; bool [B, T]."""
    lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
    return torch.arange(int(lengths_B1.max()), device=device) < lengths_B1
