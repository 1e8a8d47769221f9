"""Whether a candidate may become champion: a pure function of the report."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import ConfigError
from configs.schema.evaluation import GateConfig
from pipelines.evaluation.report import ModelScores, Report


@dataclass(frozen=True)
class Decision:
    """What the gate decided."""

    passed: bool
    reasons: tuple[str, ...]
    """One sentence for each condition, met or not."""


def gate(report: Report, config: GateConfig) -> Decision:
    """Compares the candidate with the baseline, score by score; every condition must hold.

    Raises:
        ConfigError: the gate names a model that is not in the report.
    """
    baseline, candidate = _model(report, config.baseline, "baseline"), _model(report, config.candidate, "candidate")
    verdicts = []
    for metric, wanted in sorted(config.min_gain.items()):
        if metric not in candidate.scores or metric not in baseline.scores:
            verdicts.append((False, f"{metric}: not in the report"))
            continue
        new, old = candidate.scores[metric].value, baseline.scores[metric].value
        gain = new - old
        holds = gain >= wanted
        verdicts.append((holds, f"{metric}: {old:.1f} -> {new:.1f}, {gain:+.1f} of at least {wanted:+.1f} points: "
                                f"{'holds' if holds else 'fails'}"))  # fmt: skip
    return Decision(all(holds for holds, _ in verdicts), tuple(reason for _, reason in verdicts))


def _model(report: Report, label: str, role: str) -> ModelScores:
    if label not in report.models:
        raise ConfigError(
            f"gate.{role} is no model of the report", received=label, allowed=", ".join(report.models),
            next_step="use a label of evaluate.models",
        )  # fmt: skip
    return report.models[label]
