"""The gate, and the report that it reads."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from configs.errors import CorruptArtifactError
from configs.schema.evaluation import Conditions, GateConfig
from pipelines.evaluation.gate import Measured, gate
from pipelines.evaluation.report import ModelScores, Report, scores_picture
from pipelines.evaluation.resampling import Estimate, compare, mean
from pipelines.evaluation.scoring import LOWER_IS_BETTER


def _report(**models: tuple[float, float]) -> Report:
    def interval(value: float) -> Estimate:
        return Estimate(value=value, low=value - 1, high=value + 1)

    return Report(
        rows=4,
        row_tokens=64,
        pairs={"summary": 8, "signature": 8},
        too_long={"summary": 0, "signature": 0},
        metrics={"rouge_l": "r", "chrf": "c"},
        models={
            label: ModelScores(digest=label, bits_per_byte=2.0, scores={"rouge_l": interval(r), "chrf": interval(c)})
            for label, (r, c) in models.items()
        },
    )


def _score(task: str, metric: str, old: list[float] | None, new: list[float], headline: bool = True) -> Measured:
    """Of a metric that is a mean, from the items' values."""
    first, second = ([[value, 1.0] for value in values] for values in (old or new, new))
    lower = metric in LOWER_IS_BETTER
    result = compare(np.array(first), np.array(second), mean, lower_is_better=lower)
    return Measured(task, metric, result.second, headline, result if old is not None else None)


BETTER = _score("sst2", "accuracy", [0.0] * 30 + [1.0] * 30, [0.0] * 10 + [1.0] * 50)
LUCKY = _score("gsm8k", "number_match", [0.0] * 10 + [1.0] * 10, [0.0] * 9 + [1.0] * 11)
WORSE = _score("wikitext2", "bits_per_byte", [1.0] * 60, [1.5] * 60)


def test_a_model_that_is_better_beyond_noise_and_worse_at_nothing_passes():
    decision = gate([BETTER, LUCKY], Conditions())
    assert decision.passed
    assert decision.reasons[0] == "better beyond noise: sst2.accuracy: holds"
    assert decision.reasons[1].startswith("sst2.accuracy: 0.5 -> 0.8333, p = 0.001: guard, better")


def test_a_gain_that_is_noise_is_none():
    assert not gate([LUCKY], Conditions()).passed
    assert gate([LUCKY], Conditions()).reasons[0] == "better beyond noise: nothing: fails"
    (reason,) = gate([LUCKY], Conditions(min_gain={"number_match": 0.01})).reasons
    assert reason == (
        "gsm8k.number_match: 0.5 -> 0.55, p = 1.000: a gain of +0.05 of at least +0.01, which is noise: fails"
    )
    assert gate([LUCKY], Conditions(min_gain={"number_match": 0.01}, beyond_noise=False)).passed


def test_a_task_that_got_worse_stops_a_model_that_is_better_at_another_one():
    decision = gate([BETTER, WORSE], Conditions(min_gain={"sst2.accuracy": 0.1}))
    assert not decision.passed
    assert "wikitext2.bits_per_byte: 1 -> 1.5, p = 0.001: guard, worse: fails" in decision.reasons
    assert gate([BETTER, WORSE], Conditions(min_gain={"sst2.accuracy": 0.1}, guards=("sst2",))).passed
    assert gate([BETTER, WORSE], Conditions(min_gain={"accuracy": 0.1, "bits_per_byte": -0.5})).passed
    assert not gate([BETTER, WORSE], Conditions(min_gain={"accuracy": 0.1, "bits_per_byte": -0.4})).passed


def test_a_gain_is_measured_in_the_direction_that_is_better():
    assert WORSE.gain == -0.5
    other = _score("wikitext2", "bits_per_byte", [1.5] * 60, [1.0] * 60)
    assert gate([other], Conditions(min_gain={"bits_per_byte": 0.5}, min_score={"bits_per_byte": 1.0})).passed
    assert not gate([other], Conditions(min_gain={"bits_per_byte": 0.6})).passed
    assert not gate([other], Conditions(min_score={"bits_per_byte": 0.9})).passed


def test_only_the_first_metric_of_a_task_guards_it():
    second = _score("sst2", "ece", [0.1] * 60, [0.2] * 60, headline=False)
    assert gate([BETTER, second], Conditions()).passed
    assert not gate([BETTER, second], Conditions(min_score={"ece": 0.15})).passed


@pytest.mark.parametrize("asked", [{"min_gain": {"rouge_l": 1}}, {"min_score": {"a.b": 1}}, {"guards": ("c",)}])
def test_what_the_reports_lack_fails(asked):
    decision = gate([BETTER], Conditions.model_validate(asked))
    assert not decision.passed
    assert any("not in the report: fails" in reason for reason in decision.reasons)


def test_the_first_model_needs_only_the_scores_that_are_asked_for():
    alone = _score("sst2", "accuracy", None, [1.0, 0.0, 1.0, 1.0])
    assert gate([alone], Conditions(min_gain={"accuracy": 0.1}, guards=("sst2",))).passed
    assert gate([alone], Conditions(min_score={"accuracy": 0.75})).passed
    assert not gate([alone], Conditions(min_score={"accuracy": 0.76})).passed
    assert gate([], Conditions()).passed


def test_a_model_is_not_compared_with_itself():
    with pytest.raises(ValidationError, match="two models"):
        GateConfig(baseline="a", candidate="a")


def test_a_report_survives_its_file(tmp_path):
    report = _report(old=(1.0, 2.0), new=(3.0, 4.0))
    report.save(tmp_path)
    assert Report.load(tmp_path) == report
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(CorruptArtifactError, match="no report by a stage of kind evaluate"):
        Report.load(tmp_path)


def test_the_picture_is_the_same_bytes_every_time():
    report = _report(old=(1.0, 2.0), new=(3.0, 4.0))
    first = scores_picture(report)
    assert first == scores_picture(report)
    assert first.startswith(b"\x89PNG")
