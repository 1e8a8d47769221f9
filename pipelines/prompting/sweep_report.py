"""What a sweep found, and what follows from it: a pure function of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pipelines.evaluation.resampling import Difference, Estimate
from pipelines.evaluation.scoring import OF_HUNDRED
from pipelines.evaluation.stored_report import Record, StoredReport

Advice = Literal["prompt", "fine-tune", "measure more", "set a target"]


class Cell(Record):
    """One model asked in one way."""

    model: str
    template: str
    shots: int
    sampling: str
    score: Estimate
    shown: float
    """Examples that fitted, mean over the items."""
    cut_items: int
    """Items with fewer examples than asked for, as the model's window had no room."""
    unanswered: int
    """Items that ended in an error; they count as wrong."""
    prompt_tokens: int
    """Of all items together."""

    @property
    def name(self) -> str:
        """How it is called in sentences."""
        return f"{self.model}, template {self.template}, {self.shots} shots, {self.sampling}"


class Series(Record):
    """The best cell's model, template and sampling at every number of examples, held against each other in pairs."""

    shots: tuple[int, ...]
    gains: tuple[tuple[int, int, Difference], ...]
    """Fewer shots, more shots, and what the more are worth."""


class Reference(Record):
    """A model that was trained for the task."""

    score: Estimate
    unanswered: int
    against_best: Difference
    """What it is better by than the best cell, on the same items."""


class SweepReport(StoredReport):
    """Ways to prompt models, side by side."""

    made_by: ClassVar[str] = "`ganymede prompt sweep` or a stage of kind sweep"
    format: Literal[1] = 1
    task: str
    metric: str
    signature: str
    items: int
    strategy: str
    left_out: int
    """Training records that were no examples because they are scored, or come again."""
    templates: dict[str, str]
    """Name to version."""
    cells: tuple[Cell, ...]
    best: int
    """Which cell has the highest score; of equals the one with the fewest shots, then the first."""
    series: Series
    references: dict[str, Reference]
    target: float | None

    def points(self, score: float) -> float:
        """A score, or a difference of two, from 0 to 100."""
        return score if self.metric in OF_HUNDRED else 100 * score


class Recommendation(Record):
    """What to do next, and why."""

    advice: Advice
    shots: int
    """Beyond these, more examples are not known to help."""
    gap: float | None
    """Points of the best prompt above the target; None without one."""
    sentences: tuple[str, ...]


def best_cell(cells: Sequence[Cell]) -> int:
    """Which of the cells to call the best; see `SweepReport.best`."""
    return min(range(len(cells)), key=lambda n: (-cells[n].score.value, cells[n].shots, n))


def recommend(report: SweepReport) -> Recommendation:
    """What the report says about prompting further, fine-tuning, or measuring more.

    Few-shot stops helping at the smallest number of examples that no larger one is better than beyond noise. The target
    is missed if it lies above the best prompt's whole interval, and reached if the score is at least as high.
    """
    best = report.cells[report.best]
    score = best.score
    enough = _enough(report.series)
    sentences = [
        f"Best prompt: {best.name}: {report.metric} {_points(report, score.value)} "
        f"({_points(report, score.low)} to {_points(report, score.high)}) on {report.items} items.",
        _about_shots(report, enough),
    ]
    if narrow := _about_window(report):
        sentences.append(narrow)
    target, named = report.target, "the target"
    if report.references:
        label = max(report.references, key=lambda name: report.references[name].score.value)
        reference = report.references[label]
        difference = reference.against_best
        sentences.append(
            f"{label} has {_points(report, reference.score.value)}, "
            f"{report.points(difference.difference.value):+.1f} points against the best prompt "
            f"({report.points(difference.difference.low):+.1f} to {report.points(difference.difference.high):+.1f}, "
            f"p = {difference.p_value:.3f}: {difference.verdict})."
        )
        if target is None:
            target, named = reference.score.value, label
    if target is None:
        sentences.append("There is no target and no trained model to compare with: set target, or name references.")
        return Recommendation(advice="set a target", shots=enough, gap=None, sentences=tuple(sentences))
    gap = round(report.points(score.value - target), 4)
    advice: Advice
    if score.value >= target:
        advice = "prompt"
        sentences.append(f"{gap:.1f} points above {named} ({_points(report, target)}): prompting is enough.")
    elif score.high >= target:
        advice = "measure more"
        sentences.append(
            f"{-gap:.1f} points below {named} ({_points(report, target)}), within the interval: ask more items to tell."
        )
    else:
        advice = "fine-tune"
        sentences.append(f"{-gap:.1f} points below {named} ({_points(report, target)}): fine-tune.")
    return Recommendation(advice=advice, shots=enough, gap=gap, sentences=tuple(sentences))


def _enough(series: Series) -> int:
    helped = {fewer for fewer, _, gain in series.gains if gain.verdict == "better"}
    return next(count for count in series.shots if count not in helped)


def _about_shots(report: SweepReport, enough: int) -> str:
    more = [(count, gain) for fewer, count, gain in report.series.gains if fewer == enough]
    if not more:
        return f"Few-shot still helps at {enough}, the most that were tried." if enough else "No examples were tried."
    count, gain = max(more, key=lambda one: one[1].difference.value)
    start = f"Few-shot stops helping at {enough}" if enough else "Few-shot does not help"
    return (
        f"{start}: the most that more examples add is {report.points(gain.difference.value):+.1f} points with {count} "
        f"({report.points(gain.difference.low):+.1f} to {report.points(gain.difference.high):+.1f}, "
        f"p = {gain.p_value:.3f})."
    )


def _about_window(report: SweepReport) -> str | None:
    """Where the best series did not show all the examples that it was asked to."""
    best = report.cells[report.best]
    cut = [
        f"{cell.shots} ({cell.shown:.3g} shown on average)"
        for cell in report.cells
        if cell.cut_items and (cell.model, cell.template, cell.sampling) == (best.model, best.template, best.sampling)
    ]
    return f"The window of {best.model} had no room for all examples at {', '.join(cut)}." if cut else None


def _points(report: SweepReport, score: float) -> str:
    return f"{report.points(score):.1f}"
