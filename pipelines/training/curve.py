"""The loss curve as a picture: equal figures give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curve(lines: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draws training and validation loss (nats per target) of metrics lines over the step, as a PNG."""
    figure = Figure(figsize=(7.2, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [line for line in lines if "loss" in line]
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="#9db4c8", linewidth=1.0, label="training")
    scored = [line for line in steps if "validation_loss" in line]
    axes.plot(
        [s["step"] for s in scored], [s["validation_loss"] for s in scored],
        color="#c2410c", linewidth=1.8, marker="o", markersize=3, label="validation",
    )  # fmt: skip
    axes.set(title=title, xlabel="step", ylabel="loss (nats per target)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    # The library's version in the metadata would make the bytes depend on it alone.
    figure.savefig(path, metadata={"Software": None})
