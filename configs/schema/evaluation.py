"""How models are compared on held-out data, and when one may be promoted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import Config, Input, placement


class EvaluateConfig(Config):
    """Stage `evaluate`: models side by side on held-out documents and instruction pairs."""

    kind: Literal["evaluate"] = "evaluate"
    models: Annotated[dict[str, Input], Field(min_length=1)]
    """Label in the report to model, in the order of the table; the first is the baseline."""
    corpus: Input
    data: Input
    rows: Annotated[int, Field(ge=1)] = 64
    """Validation rows scored for bits per byte."""
    pairs: Annotated[int, Field(ge=1)] = 64
    """Held-out pairs answered for each task."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 40
    max_sequences: Annotated[int, Field(ge=1)] = placement(32)
    """Sequences decoded together."""


class GateConfig(Config):
    """What the candidate must reach to become champion."""

    baseline: str
    """Label of the model in the report that must be beaten."""
    candidate: str
    """Label of the model in the report that is registered."""
    min_gain: dict[Literal["rouge_l", "chrf"], float] = Field(default={"rouge_l": 2.0, "chrf": 2.0})
    """Points (0 to 100) by which each score must be above the baseline's."""


class RegisterConfig(Config):
    """Stage `register`: an entry in the MLflow Model Registry, and its aliases."""

    kind: Literal["register"] = "register"
    model: Input
    report: Input
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name in the registry."""
    gate: GateConfig
