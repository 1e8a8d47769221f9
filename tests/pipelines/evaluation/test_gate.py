"""The gate, and the report that it reads."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from configs.errors import ConfigError, CorruptArtifactError
from configs.schema.evaluation import GateConfig
from pipelines.evaluation.gate import gate
from pipelines.evaluation.report import ModelScores, Report, scores_picture
from pipelines.evaluation.resampling import Estimate


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


GATE = GateConfig(baseline="old", candidate="new", min_gain={"rouge_l": 2.0, "chrf": 5.0})


def test_gains_on_every_score_pass():
    decision = gate(_report(old=(10.0, 20.0), new=(12.0, 40.0)), GATE)
    assert decision.passed
    assert decision.reasons == (
        "chrf: 20.0 -> 40.0, +20.0 of at least +5.0 points: holds",
        "rouge_l: 10.0 -> 12.0, +2.0 of at least +2.0 points: holds",
    )


def test_one_gain_too_small_fails_and_is_named():
    decision = gate(_report(old=(10.0, 20.0), new=(30.0, 24.9)), GATE)
    assert not decision.passed
    assert "chrf: 20.0 -> 24.9, +4.9 of at least +5.0 points: fails" in decision.reasons


def test_a_loss_can_be_allowed():
    config = GateConfig(baseline="old", candidate="new", min_gain={"chrf": -1.0})
    assert gate(_report(old=(0.0, 20.0), new=(0.0, 19.5)), config).passed
    assert not gate(_report(old=(0.0, 20.0), new=(0.0, 18.5)), config).passed


def test_a_score_that_the_report_lacks_fails():
    report = _report(old=(1.0, 2.0), new=(50.0, 60.0))
    models = {k: m.model_copy(update={"scores": {"chrf": m.scores["chrf"]}}) for k, m in report.models.items()}
    decision = gate(report.model_copy(update={"models": models}), GATE)
    assert not decision.passed
    assert "rouge_l: not in the report" in decision.reasons


def test_an_unknown_label_names_those_there_are():
    with pytest.raises(ConfigError, match=r"gate\.candidate.*'newest'.*old, new"):
        gate(_report(old=(1.0, 1.0), new=(2.0, 2.0)), GATE.model_copy(update={"candidate": "newest"}))


def test_a_model_is_not_compared_with_itself():
    with pytest.raises(ValidationError, match="two models"):
        GateConfig(baseline="a", candidate="a")


def test_a_report_survives_its_file(tmp_path):
    report = _report(old=(1.0, 2.0), new=(3.0, 4.0))
    (tmp_path / "report.json").write_text(report.to_json())
    assert Report.load(tmp_path) == report
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(CorruptArtifactError, match="no evaluation report"):
        Report.load(tmp_path)


def test_the_picture_is_the_same_bytes_every_time():
    report = _report(old=(1.0, 2.0), new=(3.0, 4.0))
    first = scores_picture(report)
    assert first == scores_picture(report)
    assert first.startswith(b"\x89PNG")
