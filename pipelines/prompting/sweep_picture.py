"""A sweep as a picture: scores over the number of examples, a panel a model, with what training reaches beside them."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from pipelines.prompting.sweep_report import SweepReport

_COLOURS = ("#2a6fbb", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#12879c", "#9a5b2c", "#c2438f")
_STYLES = ("-", "--", ":", "-.")


def sweep_picture(report: SweepReport) -> bytes:
    """A PNG; bars are 95 % intervals. Equal reports give equal bytes."""
    models = list(dict.fromkeys(cell.model for cell in report.cells))
    templates, samplings = list(report.templates), list(dict.fromkeys(cell.sampling for cell in report.cells))
    figure = Figure(figsize=(1.2 + 4.6 * len(models), 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    shots = sorted({cell.shots for cell in report.cells})
    for panel, model in zip(panels, models, strict=True):
        lines = [(template, sampling) for template in templates for sampling in samplings]
        for number, (template, sampling) in enumerate(lines):
            cells = [c for c in report.cells if (c.model, c.template, c.sampling) == (model, template, sampling)]
            values = [report.points(c.score.value) for c in cells]
            below = [max(0.0, report.points(c.score.value - c.score.low)) for c in cells]
            above = [max(0.0, report.points(c.score.high - c.score.value)) for c in cells]
            # Beside each other, so that intervals can be told apart.
            shift = (number - (len(lines) - 1) / 2) * 0.6 / max(1, len(lines))
            panel.errorbar(
                [shots.index(c.shots) + shift for c in cells], values, [below, above], capsize=2.5, linewidth=1.5,
                marker="o", markersize=4, color=_COLOURS[templates.index(template) % len(_COLOURS)],
                linestyle=_STYLES[samplings.index(sampling) % len(_STYLES)], elinewidth=0.8,
                label=template if len(samplings) == 1 else f"{template}, {sampling}",
            )  # fmt: skip
        for number, (label, reference) in enumerate(report.references.items()):
            score, colour = reference.score, _COLOURS[-1 - number % len(_COLOURS)]
            panel.axhspan(report.points(score.low), report.points(score.high), color=colour, alpha=0.1, linewidth=0)
            panel.axhline(report.points(score.value), color=colour, linewidth=1.2, label=f"{label} (trained)")
        if report.target is not None:
            panel.axhline(report.points(report.target), color="#444444", linestyle=(0, (1, 2)), label="target")
        panel.set_title(model, fontsize=11)
        panel.set_xlabel("examples in the prompt")
        panel.xaxis.set_major_locator(FixedLocator(range(len(shots))))
        panel.set_xticklabels([str(count) for count in shots])
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{report.metric}, points")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"{report.task}: {report.items} items, {report.strategy} examples, 95 % intervals", fontsize=10)
    buffer = io.BytesIO()
    # The library's version in the metadata would make the bytes depend on it alone.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
