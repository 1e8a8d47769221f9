"""How models are compared on held-out data, and when one may be promoted."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Config, Input

Metric = Literal["rouge_l", "chrf"]
"""Scores from 0 to 100: ROUGE-L of the summaries, chrF of the signatures."""


class EvaluateConfig(Config):
    """Stage `evaluate`: models side by side on held-out documents and instruction pairs."""

    kind: Literal["evaluate"] = "evaluate"
    models: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")], Input], Field(min_length=1)
    ]
    """Label in the report to model, in the order of the tables."""
    corpus: Input
    data: Input
    rows: Annotated[int, Field(ge=1)] = 64
    """Validation rows scored for bits per byte; each as long as the shortest context of the models."""
    pairs: Annotated[int, Field(ge=1)] = 64
    """Held-out pairs answered for each task."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 40
    """Longest answer in tokens."""
    max_sequences: Annotated[int, Field(ge=1)] = 32
    """Sequences decoded together. It counts as content: the rounding of matrix products depends on it, and a greedy
    answer may turn on that."""


class GateConfig(Config):
    """What the candidate must reach to become champion."""

    baseline: str
    """Label of the model in the report that must be beaten."""
    candidate: str
    """Label of the model in the report that is registered."""
    min_gain: dict[Metric, float] = Field({"rouge_l": 2.0, "chrf": 2.0}, min_length=1)
    """Points (0 to 100) by which each score must be above the baseline's."""

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        if self.baseline == self.candidate:
            raise ValueError(f"baseline and candidate must be two models of the report; both are {self.baseline!r}")
        return self


class RegisterConfig(Config):
    """Stage `register`: an entry in the MLflow Model Registry, and its aliases."""

    kind: Literal["register"] = "register"
    model: Input
    report: Input
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name in the registry."""
    gate: GateConfig
