"""How models are compared on held-out data, and when one may be promoted."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from configs.schema.base import Config, Input, InputMarker, placement
from configs.schema.model import is_folder

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


class Conditions(Config):
    """What a model must reach to take an alias from the model that has it. A SCORE is `METRIC` or `TASK.METRIC`."""

    min_gain: dict[str, float] = Field({})
    """SCORE to how much better it must be, in the metric's own unit; a number below 0 is a loss that is put up with."""
    min_score: dict[str, float] = Field({})
    """SCORE to the least it must be; of perplexities, bits per byte and ECE the most."""
    guards: tuple[str, ...] | None = None
    """Tasks whose first metric must not get worse by more than noise; unless set, all that `min_gain` does not name."""
    beyond_noise: bool = True
    """Whether a gain that is asked for counts only if its p-value is below 5 %."""


class GateConfig(Config):
    """What the candidate must reach to become champion."""

    baseline: str
    """Label of the model in the report that must be beaten."""
    candidate: str
    """Label of the model in the report that is registered."""
    min_gain: dict[Metric, float] = Field({"rouge_l": 2.0, "chrf": 2.0}, min_length=1)
    """Points (0 to 100) by which each score must be above the baseline's."""
    beyond_noise: bool = False
    """Whether a gain counts only if its p-value is below 5 %."""

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        if self.baseline == self.candidate:
            raise ValueError(f"baseline and candidate must be two models of the report; both are {self.baseline!r}")
        return self

    @property
    def conditions(self) -> Conditions:
        """The same as conditions on the scores of any report; no task is a guard."""
        return Conditions(min_gain=dict(self.min_gain), guards=(), beyond_noise=self.beyond_noise)


class RegisterConfig(Config):
    """Stage `register`: an entry in the MLflow Model Registry, and its aliases."""

    kind: Literal["register"] = "register"
    model: Input
    report: Input
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name in the registry."""
    gate: GateConfig


def stands_alone(model: str) -> bool:
    """Whether a model to evaluate is no stage or artifact, but a folder or a model of an endpoint."""
    return is_folder(model) or is_endpoint(model)


def is_endpoint(model: str) -> bool:
    """Whether a model to evaluate is `http(s)://HOST/v1#NAME`."""
    return model.startswith(("http://", "https://"))


class TasksConfig(Config):
    """Stage `tasks`: models scored on tasks, each in a YAML file of its own. `ganymede evaluate` runs this stage."""

    kind: Literal["tasks"] = "tasks"
    models: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")],
            Annotated[str, InputMarker(unless=stands_alone), Field(min_length=1)],
        ],
        Field(min_length=1),
    ]
    """Label in the report to model: a stage, an artifact, a folder (beginning with `/`, `.` or `~`), or a model of an
    OpenAI-compatible endpoint (`http://127.0.0.1:8000/v1#NAME`)."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = placement(...)
    """Packaged tasks by name, others by the path of their file."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Examples before each prompt, the same for all, drawn from the task's training split."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Decides which examples are drawn."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Items of each task that are asked, the first ones by the hash of their content; all unless set."""
    chat: bool = False
    """Prompts are what a user says under the model's chat template."""
    max_sequences: Annotated[int, Field(ge=1)] = 128
    """Answers generated together. It counts as content, as it does for the stage `evaluate`."""
    parallel: Annotated[int, Field(ge=1, le=256)] = placement(8)
    """Requests in flight to an endpoint."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = placement(None)
    """What the machines cost an hour, in any currency; the cost of 1,000 items is then told beside their scores."""
    replicas: Annotated[int, Field(ge=1, le=1024)] = placement(1)
    """Copies of a model that is no endpoint's, each in a Ray actor if there are several."""

    @field_validator("models")
    @classmethod
    def _endpoints_name_a_model(cls, models: dict[str, str]) -> dict[str, str]:
        for label, model in models.items():
            if is_endpoint(model) and not model.partition("#")[2]:
                raise ValueError(f"models.{label} names no model of the endpoint: write {model}#NAME")
        return models


class JudgeConfig(Config):
    """Stage `judge`: which of two models answers better, said by a third one. `ganymede judge` runs this stage."""

    kind: Literal["judge"] = "judge"
    first: Input
    """A report of tasks, like `second`; both were asked alike."""
    second: Input
    first_model: str | None = None
    """Label in the report; needed where it has several models."""
    second_model: str | None = None
    task: Annotated[str, Field(min_length=1)]
    """A task of both reports whose answers are written."""
    judge: Annotated[str, Field(min_length=1)]
    """A chat model of an OpenAI-compatible endpoint: `http://127.0.0.1:8000/v1#NAME`."""
    criterion: Annotated[str, Field(min_length=1)] = (
        "Which answer serves better who asked: correct, complete, to the point?"
    )
    """What the judge is asked."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Items that are judged, the first ones of the reports; all unless set."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Room for what the judge says before its verdict."""
    parallel: Annotated[int, Field(ge=1, le=256)] = placement(8)
    """Requests in flight to the endpoint."""

    @field_validator("judge")
    @classmethod
    def _is_a_model_of_an_endpoint(cls, judge: str) -> str:
        if not (is_endpoint(judge) and judge.partition("#")[2]):
            raise ValueError(f"judge is a model of an endpoint, http://HOST/v1#NAME; received {judge!r}")
        return judge
