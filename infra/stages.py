"""Every kind of stage that a recipe can name.

A stage's module is imported when the stage is first asked for: training and evaluation bring torch and transformers,
which took 12 s and 480 MB that a recipe of corpora alone does not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Final

from pipelines.stage import Stage

_PLACES: Final[dict[str, tuple[str, str]]] = {
    "tokenizer": ("pipelines.stages.tokenizer", "TokenizerStage"),
    "corpus": ("pipelines.stages.corpus", "CorpusStage"),
    "instructions": ("pipelines.stages.instructions", "InstructionsStage"),
    "examples": ("pipelines.stages.examples", "ExamplesStage"),
    "prompts": ("pipelines.stages.prompts", "PromptsStage"),
    "baseline": ("pipelines.stages.baseline", "BaselineStage"),
    "pretrain": ("pipelines.stages.pretrain", "PretrainStage"),
    "finetune": ("pipelines.stages.finetune", "FinetuneStage"),
    "evaluate": ("pipelines.stages.evaluate", "EvaluateStage"),
    "tasks": ("pipelines.stages.tasks", "TasksStage"),
    "judge": ("pipelines.stages.judge", "JudgeStage"),
    "sweep": ("pipelines.stages.sweep", "SweepStage"),
    "compare": ("pipelines.stages.compare", "CompareStage"),
    "register": ("pipelines.stages.register", "RegisterStage"),
    "deploy": ("infra.deploy", "DeployStage"),
}
"""Module and class of each kind."""


class _Stages(Mapping[str, Stage[Any]]):
    """Stages by kind."""

    def __getitem__(self, kind: str) -> Stage[Any]:
        module, name = _PLACES[kind]
        stage: Stage[Any] = getattr(import_module(module), name)()
        return stage

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


STAGES: Final[Mapping[str, Stage[Any]]] = _Stages()
