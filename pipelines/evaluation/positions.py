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


def window_starts(tokens: int, length: int) -> range:
    """Where the windows of `length` that `nats_of_stream` reads that many tokens in begin."""
    stride = length // 2
    return range(0, max(tokens - 1 - length, 0) + stride, stride)


@torch.inference_mode()
def nats_of_stream(
    model: nn.Module, tokens: npt.NDArray[np.int64], length: int, progress: Callable[[int], None]
) -> float:
    """Negative log-likelihood, in nats, of all of `tokens` but the first, each given at least the half of `length`
    before it, or all there are.

    Read in windows of `length` that overlap by half, of which all but the first count their second half.
    """
    model.eval()
    stride = length // 2
    starts = window_starts(len(tokens), length)
    total = 0.0
    for begin in range(0, len(starts), _ROWS):
        part = starts[begin : begin + _ROWS]
        rows = np.zeros((len(part), length + 1), dtype=np.int64)
        counted = torch.zeros((len(part), length), dtype=torch.bool)
        for number, start in enumerate(part):
            window = tokens[start : start + length + 1]
            rows[number, : len(window)] = window
            counted[number, 0 if start == 0 else length - stride : len(window) - 1] = True
        read = torch.from_numpy(rows)
        logits = model(input_ids=read[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), read[:, 1:], reduction="none")
        total += float(losses[counted].double().sum())
        progress(min(begin + _ROWS, len(starts)))
    return total


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
