"""Every kind of stage that a recipe can name.

Importing this module loads Ray, torch and transformers; the command line does so only when a recipe is run.
"""

from __future__ import annotations

from typing import Any

from infra.deploy import DeployStage
from pipelines.stage import Stage
from pipelines.stages.baseline import BaselineStage
from pipelines.stages.compare import CompareStage
from pipelines.stages.corpus import CorpusStage
from pipelines.stages.evaluate import EvaluateStage
from pipelines.stages.examples import ExamplesStage
from pipelines.stages.finetune import FinetuneStage
from pipelines.stages.instructions import InstructionsStage
from pipelines.stages.pretrain import PretrainStage
from pipelines.stages.register import RegisterStage
from pipelines.stages.tokenizer import TokenizerStage

STAGES: dict[str, Stage[Any]] = {
    stage.kind: stage
    for stage in (
        TokenizerStage(),
        CorpusStage(),
        InstructionsStage(),
        ExamplesStage(),
        BaselineStage(),
        PretrainStage(),
        FinetuneStage(),
        EvaluateStage(),
        CompareStage(),
        RegisterStage(),
        DeployStage(),
    )
}
