"""How well a decoder predicts at each position of its context, and pictures of that and of how it learned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

_ROWS = 8
"""Rows read at once; decides memory and rounding."""


@torch.inference_mode()
def nats_by_position(
    model: nn.Module, rows: npt.NDArray[np.int64], progress: Callable[[int], None]
) -> npt.NDArray[np.float64]:
    """Mean negative log-likelihood, in nats, of the token after each position of `rows` [rows, length + 1]: [length].

    `progress` is told how many rows are read.
    """
    model.eval()
    total = torch.zeros(rows.shape[1] - 1, dtype=torch.float64)
    for begin in range(0, len(rows), _ROWS):
        tokens = torch.from_numpy(rows[begin : begin + _ROWS])
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        total += losses.double().sum(0)
        progress(min(begin + _ROWS, len(rows)))
    result: npt.NDArray[np.float64] = (total / len(rows)).numpy()
    return result


def doubling_means(nats: Sequence[float]) -> list[tuple[int, int, float]]:
    """Perplexity over the positions 1, 2, 3-4, 5-8 and so on, as (first, last, perplexity)."""
    edges = [0, 1]
    while edges[-1] < len(nats):
        edges.append(min(2 * edges[-1], len(nats)))
    return [(a + 1, b, math.exp(math.fsum(nats[a:b]) / (b - a))) for a, b in itertools.pairwise(edges)]


def draw_comparison(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], positions: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Draws validation loss over the tokens seen, and perplexity by position, of each model, side by side as a PNG."""
    figure = Figure(figsize=(10.0, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    learned, helped = figure.subplots(1, 2)
    for label, lines in curves.items():
        scored = [line for line in lines if "validation_loss" in line]
        seen, losses = [line["tokens_seen"] for line in scored], [line["validation_loss"] for line in scored]
        learned.plot(seen, losses, marker="o", markersize=3, label=label)
    for label, nats in positions.items():
        means = doubling_means(nats)
        helped.plot(
            [last for _, last, _ in means], [value for *_, value in means], marker="o", markersize=3, label=label
        )
    learned.set(title="Learning", xlabel="training tokens", ylabel="validation loss (nats per token)")
    helped.set(title="Use of the context", xlabel="position", ylabel="perplexity", xscale="log")
    for axes in (learned, helped):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    # The library's version in the metadata would make the bytes depend on it alone.
    figure.savefig(path, metadata={"Software": None})
