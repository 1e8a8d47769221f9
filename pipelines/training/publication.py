"""A finished run as the files of a model artifact, equal for equal weights: no times, no host names, no paths."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.text import Text
from configs.schema.training import TrainingConfig
from pipelines.stage import StageContext
from pipelines.training.card import Card
from pipelines.training.checkpoint import Checkpoints, without_prefix
from pipelines.training.curve import draw_curve
from pipelines.training.metrics import FILE, STEP_FIGURES, read_metrics
from pipelines.training.models import Head, context_length, parameter_count, save_model
from pipelines.training.worker import CHECKPOINTS, HARDWARE

_TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "contract.json"
)  # fmt: skip


CURVE = "curve.json"
"""The figures of every logged step that do not depend on the clock."""
_TIMED = ("time_ms", "tokens_per_second", "mfu", "data_wait_fraction")


@dataclass(frozen=True)
class Publication:
    """What a model artifact says about itself."""

    title: str
    head: Head
    text_from: Path
    """Folder that the tokenizer's files and the contract are copied from."""
    eos_token_ids: Iterable[int]
    pad_token_id: int
    facts: Mapping[str, str]
    """Lines of the card beside those every model has."""


@dataclass(frozen=True)
class Scores:
    """What a finished model reaches on held-out data, and how that was measured in the words of the packages."""

    values: Mapping[str, float] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)


def write_model(
    publication: Publication,
    model: nn.Module,
    config: TrainingConfig,
    context: StageContext,
    *,
    score: Callable[[], Scores] = Scores,
) -> dict[str, Any]:
    """Writes the model artifact of a finished run to `context.out`, its curve into the tracker; returns the summary.

    `model` gives the architecture; its weights are replaced by those of the last checkpoint. `score` is called when
    the model can be opened there, for what is measured only at the end.
    """
    checkpoint = Checkpoints(context.work / CHECKPOINTS).load(config.steps)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in without_prefix("model", checkpoint.tensors).items():
            parameters[name].copy_(value)
    save_model(model, context.out, eos_token_ids=publication.eos_token_ids, pad_token_id=publication.pad_token_id)
    for name in _TEXT_FILES:
        if (publication.text_from / name).exists():
            shutil.copyfile(publication.text_from / name, context.out / name)
    lines = [line for line in read_metrics(context.work / FILE) if "step" in line]
    draw_curve(lines, context.out / "loss.png", title=publication.title)
    curve = [{name: value for name, value in line.items() if name not in _TIMED} for line in lines]
    (context.out / CURVE).write_text(json.dumps(curve) + "\n")
    context.run.log_file(context.out / "loss.png")
    scored = [line for line in lines if "validation_loss" in line]
    scores = score()
    card = Card(
        title=publication.title,
        head=publication.head,
        model_type=model.config.model_type,
        context_length=context_length(context.out),
        contract=_contract_hash(context.out),
        facts={
            **publication.facts,
            "Parameters": f"{parameter_count(model):,}",
            "Optimizer steps": f"{config.steps:,}",
            "Targets seen": f"{checkpoint.tokens_seen:,}",
        },
        numbers={**_evaluated(scored[-1]), **scores.values},
        signatures=scores.signatures,
    )
    (context.out / "README.md").write_text(card.text(), encoding="utf-8")
    hardware = json.loads((context.work / HARDWARE).read_bytes())
    return {
        **_summary(lines, scored, parameter_count(model), checkpoint.tokens_seen),
        **scores.values,
        **({"signatures": dict(scores.signatures)} if scores.signatures else {}),
        **hardware,
    }


def _contract_hash(folder: Path) -> str | None:
    contract = Text.load(folder).contract
    return None if contract is None else contract.hash


def _summary(
    lines: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]], parameters: int, tokens_seen: int
) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "steps": lines[-1]["step"],
        "tokens_seen": tokens_seen,
        "first_loss": lines[0]["loss"],
        "loss": lines[-1]["loss"],
        "first_validation_loss": scored[0]["validation_loss"],
        **_evaluated(scored[-1]),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "mfu": statistics.median(line["mfu"] for line in lines),
    }


def _evaluated(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation."""
    return {name: value for name, value in line.items() if name not in STEP_FIGURES}
