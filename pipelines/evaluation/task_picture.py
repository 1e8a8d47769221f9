"""A report of tasks as a picture: a panel a task, a bar with its interval for each model and score."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.evaluation.scoring import LOWER_IS_BETTER, OF_HUNDRED
from pipelines.evaluation.task_report import TasksReport

PICTURE = "scores.png"
_UNBOUNDED = ("perplexity", "word_perplexity", "bits_per_byte")
_HEIGHT_INCHES = 0.28
"""Of a bar."""


def task_picture(report: TasksReport) -> bytes:
    """A PNG. Equal reports give equal bytes."""
    models = list(report.models)
    panels = [(task, metric) for task, facts in report.tasks.items() for metric in facts.metrics]
    height = 0.6 + len(panels) * (0.45 + _HEIGHT_INCHES * len(models))
    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (task, metric) in zip(axes, panels, strict=True):
        found = [report.models[model].tasks[task].scores[metric] for model in models]
        spread = [[max(0.0, s.value - s.low) for s in found], [max(0.0, s.high - s.value) for s in found]]
        axis.barh(models, [s.value for s in found], 0.7, xerr=spread, capsize=3, color="#7fa8d6", ecolor="#222222")
        axis.invert_yaxis()
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        axis.set_title(f"{task}: {metric} ({better} is better)", fontsize=9, loc="left")
        best = 100.0 if metric in OF_HUNDRED else 1.0
        axis.set_xlim(0, 1.15 * max(s.high for s in found) if metric in _UNBOUNDED else best)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        for row, score in enumerate(found):
            axis.annotate(f"{score.value:.4g}", (axis.get_xlim()[1], row), (4, 0), textcoords="offset points",
                          va="center", fontsize=8, annotation_clip=False)  # fmt: skip
    figure.suptitle("scores with 95 % intervals", fontsize=10)
    buffer = io.BytesIO()
    # The library's version in the metadata would make the bytes depend on it alone.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
