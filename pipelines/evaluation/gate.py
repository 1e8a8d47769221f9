"""Whether a model may take an alias from the model that has it: a pure function of scores.

One gate for the stage `register` and for `ganymede promote`. Scores of two models on the same items come with the
p-value of their difference (`resampling`). One of 5 % or more is noise: not a gain where one is asked for, and no loss
to a guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.schema.evaluation import Conditions
from pipelines.evaluation.comparing import Comparison
from pipelines.evaluation.resampling import Difference
from pipelines.evaluation.scoring import LOWER_IS_BETTER


@dataclass(frozen=True)
class Measured:
    """One score of the candidate."""

    task: str
    metric: str
    value: float
    headline: bool = True
    """It is the task's first metric, by which the task is a guard."""
    against: Difference | None = None
    """How it differs from the model that has the alias; None if none has it."""

    @property
    def name(self) -> str:
        """`TASK.METRIC`."""
        return f"{self.task}.{self.metric}"

    @property
    def gain(self) -> float:
        """How much better it is; below 0 if worse."""
        change = 0.0 if self.against is None else self.against.second - self.against.first
        return -change if self.metric in LOWER_IS_BETTER else change


@dataclass(frozen=True)
class Decision:
    """What the gate decided."""

    passed: bool
    reasons: tuple[str, ...]
    """One sentence for each condition, met or not."""


Verdict = tuple[bool, str]


def measured(comparisons: Sequence[Comparison]) -> list[Measured]:
    """The second model's scores against the first one's; the first metric of a task is its headline."""
    seen: set[str] = set()
    found = []
    for one in comparisons:
        found.append(Measured(one.task, one.metric, one.result.second, one.task not in seen, one.result))
        seen.add(one.task)
    return found


def gate(scores: Sequence[Measured], conditions: Conditions) -> Decision:
    """Every condition must hold; without `min_gain`, and against a model, some headline must be better beyond noise."""
    verdicts: list[Verdict] = []
    for name, wanted in sorted(conditions.min_gain.items()):
        named = _named(scores, name)
        verdicts += [_gain(one, wanted, conditions.beyond_noise) for one in named] or [_missing(name)]
    for name, wanted in sorted(conditions.min_score.items()):
        verdicts += [_score(one, wanted) for one in _named(scores, name)] or [_missing(name)]
    heads = [one for one in scores if one.headline]
    if any(one.against for one in heads) and not conditions.min_gain:
        better = [one.name for one in heads if one.against is not None and one.against.verdict == "better"]
        verdicts.append((bool(better), f"better beyond noise: {', '.join(better) or 'nothing'}: {_word(bool(better))}"))
    aims = {one.task for name in conditions.min_gain for one in _named(scores, name)}
    guards = [one.task for one in heads if one.task not in aims] if conditions.guards is None else conditions.guards
    for task in guards:
        verdicts += [_guard(one) for one in heads if one.task == task] or [_missing(task)]
    return Decision(all(holds for holds, _ in verdicts), tuple(reason for _, reason in verdicts))


def _named(scores: Sequence[Measured], name: str) -> list[Measured]:
    return [one for one in scores if name in (one.metric, one.name)]


def _missing(name: str) -> Verdict:
    return False, f"{name}: not in the report: fails"


def _word(holds: bool) -> str:
    return "holds" if holds else "fails"


def _change(one: Measured, against: Difference) -> str:
    return f"{one.name}: {against.first:.4g} -> {against.second:.4g}, p = {against.p_value:.3f}"


def _gain(one: Measured, wanted: float, beyond_noise: bool) -> Verdict:
    if one.against is None:
        return True, f"{one.name}: {one.value:.4g}, and no model to gain on: holds"
    # Sums in another order, and six decimals: a gain that is short by their rounding alone is enough.
    enough = one.gain >= wanted - 1e-6
    noise = enough and wanted > 0 and beyond_noise and one.against.verdict == "noise"
    why = ", which is noise" if noise else ""
    holds = enough and not noise
    gain = f"a gain of {one.gain:+.4g} of at least {wanted:+.4g}{why}"
    return holds, f"{_change(one, one.against)}: {gain}: {_word(holds)}"


def _score(one: Measured, wanted: float) -> Verdict:
    lower = one.metric in LOWER_IS_BETTER
    holds = one.value <= wanted if lower else one.value >= wanted
    return holds, f"{one.name}: {one.value:.4g} of at {'most' if lower else 'least'} {wanted:.4g}: {_word(holds)}"


def _guard(one: Measured) -> Verdict:
    if one.against is None:
        return True, f"{one.name}: {one.value:.4g}, and no model to fall behind: holds"
    holds = one.against.verdict != "worse"
    return holds, f"{_change(one, one.against)}: guard, {one.against.verdict}: {_word(holds)}"
