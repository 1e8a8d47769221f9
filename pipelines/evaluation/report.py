"""The evaluation report: what `evaluate` writes and `register` decides by."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import ClassVar, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs.schema.evaluation import Metric
from pipelines.corpus.instructions import Task
from pipelines.evaluation.resampling import Estimate
from pipelines.evaluation.stored_report import Record, StoredReport

PAIRS = "answers.jsonl"
"""What was asked, and every model's answer with its score."""
_TITLES: Mapping[Metric, str] = {"rouge_l": "summaries\n(ROUGE-L)", "chrf": "signatures\n(chrF)"}


class ModelScores(Record):
    """The scores of one model."""

    digest: str
    """Of the model artifact."""
    bits_per_byte: float
    scores: dict[Metric, Estimate]
    """0 to 100; the mean over the answers of the metric's task."""


class Report(StoredReport):
    """Models side by side."""

    made_by: ClassVar[str] = "a stage of kind evaluate"
    format: Literal[1] = 1
    rows: int
    row_tokens: int
    """The validation rows behind `bits_per_byte`."""
    pairs: dict[Task, int]
    too_long: dict[Task, int]
    """Pairs left out because they do not fit the context of every model."""
    metrics: dict[Metric, str]
    """How each score is made."""
    models: dict[str, ModelScores]


def scores_picture(report: Report) -> bytes:
    """A PNG: a group of bars for each score, a bar with its interval for each model, and bits per byte beside it.

    Equal reports give equal bytes.
    """
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    points, bits = figure.subplots(1, 2, width_ratios=(2, 1))
    metrics = list(report.metrics)
    width = 0.8 / len(report.models)
    for index, (label, model) in enumerate(report.models.items()):
        found = [model.scores[metric] for metric in metrics]
        where = [group + (index - (len(report.models) - 1) / 2) * width for group in range(len(metrics))]
        spread = [[max(0.0, s.value - s.low) for s in found], [max(0.0, s.high - s.value) for s in found]]
        points.bar(where, [s.value for s in found], width * 0.95, yerr=spread, capsize=4, label=label)
        for x, score in zip(where, found, strict=True):
            points.annotate(f"{score.value:.1f}", (x, score.high), (0, 3), textcoords="offset points", ha="center")
        bits.bar(index, model.bits_per_byte, 0.8)
        bits.annotate(f"{model.bits_per_byte:.2f}", (index, model.bits_per_byte), (0, 3),
                      textcoords="offset points", ha="center")  # fmt: skip
    points.set_xticks(range(len(metrics)), [_TITLES[metric] for metric in metrics])
    points.set_ylabel("points, 0 to 100")
    points.set_title("held-out answers, 95 % intervals (higher is better)", fontsize=10)
    points.margins(y=0.12)
    points.legend()
    bits.set_xticks(range(len(report.models)), list(report.models), rotation=20)
    bits.set_title("bits per byte (lower is better)", fontsize=10)
    bits.margins(y=0.12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
