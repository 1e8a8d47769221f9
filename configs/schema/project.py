"""A recipe: a project and its stages."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from configs.schema.base import Config, references
from configs.schema.comparison import CompareConfig
from configs.schema.corpus import CorpusConfig, InstructionsConfig, TokenizerConfig
from configs.schema.evaluation import EvaluateConfig, JudgeConfig, RegisterConfig, TasksConfig
from configs.schema.examples import BaselineConfig, ExamplesConfig
from configs.schema.prompting import PromptsConfig, SweepConfig
from configs.schema.serving import DeployConfig
from configs.schema.training import FinetuneConfig, PretrainConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

StageConfig = Annotated[
    TokenizerConfig
    | CorpusConfig
    | InstructionsConfig
    | ExamplesConfig
    | PromptsConfig
    | BaselineConfig
    | PretrainConfig
    | FinetuneConfig
    | EvaluateConfig
    | TasksConfig
    | JudgeConfig
    | SweepConfig
    | CompareConfig
    | RegisterConfig
    | DeployConfig,
    Field(discriminator="kind"),
]


class Recipe(Config):
    """A graph of stages. A stage whose key is the name of its kind may leave `kind` out."""

    name: Annotated[str, Field(pattern=NAME)]
    """Project name; artifacts are called `<kind>/<name>-<stage>@<version>`."""
    description: str = ""
    version: Annotated[int, Field(ge=1)] = 1
    """Version that newly made artifacts are published under."""
    stages: Annotated[dict[Annotated[str, Field(pattern=NAME)], StageConfig], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _kind_from_key(cls, data: Any) -> Any:
        stages = data.get("stages") if isinstance(data, dict) else None
        if not isinstance(stages, dict):
            return data
        named = {k: {"kind": k, **v} if isinstance(v, dict) and "kind" not in v else v for k, v in stages.items()}
        return {**data, "stages": named}

    @model_validator(mode="after")
    def _is_a_graph(self) -> Self:
        self.order()
        return self

    def inputs(self, stage: str) -> dict[str, str]:
        """Role to reference, for the inputs of `stage`."""
        return dict(references(self.stages[stage]))

    def order(self) -> list[str]:
        """Stage names, each after the stages it takes its inputs from; ties keep the recipe's order.

        Raises:
            ValueError: a reference names no stage and no artifact, or the stages form a cycle.
        """
        done: list[str] = []
        visiting: list[str] = []

        def visit(name: str) -> None:
            if name in done:
                return
            if name in visiting:
                raise ValueError(f"stages form a cycle: {' -> '.join([*visiting, name])}")
            visiting.append(name)
            for role, reference in self.inputs(name).items():
                if reference in self.stages:
                    visit(reference)
                elif "@" not in reference:
                    known = ", ".join(self.stages)
                    raise ValueError(
                        f"stages.{name}.{role} names no stage: received {reference!r}; allowed: one of {known}, "
                        "or an artifact kind/name@version"
                    )
            visiting.pop()
            done.append(name)

        for name in self.stages:
            visit(name)
        return done
