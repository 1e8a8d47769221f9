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
from pipelines.training.adapters import ADAPTER, Adapters
from pipelines.training.card import Card
from pipelines.training.checkpoint import Checkpoint, Checkpoints, without_prefix
from pipelines.training.curve import draw_curve
from pipelines.training.examples import Framing
from pipelines.training.loop import AVERAGE
from pipelines.training.metrics import FILE, STEP_FIGURES, read_metrics
from pipelines.training.models import Head, parameter_count, save_model, set_generation, trained_count, window
from pipelines.training.samples import FILE as SAMPLES
from pipelines.training.samples import read_samples
from pipelines.training.worker import CHECKPOINTS, HARDWARE

_TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "contract.json"
)  # fmt: skip


KEPT = "checkpoints"
"""Folder of the models of earlier steps that were kept."""
CURVE = "curve.json"
"""The figures of every logged step that do not depend on the clock."""
_TIMED = ("time_ms", "tokens_per_second", "mfu", "data_wait_fraction", "checkpoint_stall_seconds")


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
    framing: Framing | None = None
    """What stands around every text that the model reads; None for models of running text."""


@dataclass(frozen=True)
class Scores:
    """What a finished model reaches on held-out data, and how that was measured in the words of the packages."""

    values: Mapping[str, float] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)


def unscored(model: nn.Module) -> Scores:
    """Of a model whose evaluations in training say all."""
    return Scores()


def write_model(
    publication: Publication,
    model: nn.Module,
    config: TrainingConfig,
    context: StageContext,
    *,
    adapters: Adapters | None = None,
    score: Callable[[nn.Module], Scores] = unscored,
) -> dict[str, Any]:
    """Writes the model artifact of a finished run to `context.out`, its curve into the tracker; returns the summary.

    `model` gives the architecture; its weights are replaced by those of the last checkpoint, or by their average if the
    run kept one. `adapters` that are attached to it are written too, and the model itself only if they are to be merged
    into it, which they then are. `score` is asked for what is measured of the finished model alone.
    """
    checkpoints = Checkpoints(context.work / CHECKPOINTS, every_steps=config.checkpoint_every_steps)
    for step in filter(checkpoints.is_kept, checkpoints.steps()):
        if step < config.steps:
            _take_weights(model, checkpoints.load(step), config)
            _write_kept(publication, model, adapters, context.out / KEPT / f"step-{step:08d}")
    checkpoint = checkpoints.load(config.steps)
    _take_weights(model, checkpoint, config)
    trained = trained_count(model)
    _write_weights(publication, model, adapters, context.out)
    sizes = {"parameters": parameter_count(model), "trained_parameters": trained}
    for name in _TEXT_FILES:
        if (publication.text_from / name).exists():
            shutil.copyfile(publication.text_from / name, context.out / name)
    if publication.framing is not None:
        publication.framing.write(context.out)
    lines = [line for line in read_metrics(context.work / FILE) if "step" in line]
    draw_curve(lines, context.out / "loss.png", title=publication.title)
    curve = [{name: value for name, value in line.items() if name not in _TIMED} for line in lines]
    (context.out / CURVE).write_text(json.dumps(curve) + "\n")
    context.run.log_file(context.out / "loss.png")
    samples = read_samples(context.work / SAMPLES, Text.load(publication.text_from))
    if samples:
        context.run.log_table(samples, "samples.json")
    scored = [line for line in lines if "validation_loss" in line]
    scores = score(model)
    card = Card(
        title=publication.title,
        head=publication.head,
        model_type=model.config.model_type,
        context_length=window(model.config),
        contract=_contract_hash(context.out),
        facts={
            **publication.facts,
            "Parameters": f"{sizes['parameters']:,}",
            **({} if adapters is None else _adapter_facts(adapters, sizes["trained_parameters"])),
            "Optimizer steps": f"{config.steps:,}",
            "Targets seen": f"{checkpoint.tokens_seen:,}",
        },
        numbers={**_evaluated(scored[-1]), **scores.values},
        signatures=scores.signatures,
        adapter=None if adapters is None else ADAPTER,
        merged=adapters is None or adapters.config.merge,
    )
    (context.out / "README.md").write_text(card.text(), encoding="utf-8")
    hardware = json.loads((context.work / HARDWARE).read_bytes())
    return {
        **sizes,
        **_summary(lines, scored, checkpoint.tokens_seen),
        **scores.values,
        **({"signatures": dict(scores.signatures)} if scores.signatures else {}),
        **hardware,
    }


@torch.no_grad()
def _take_weights(model: nn.Module, checkpoint: Checkpoint, config: TrainingConfig) -> None:
    parameters = dict(model.named_parameters())
    weights = AVERAGE if config.ema_decay is not None else "model"
    for name, value in without_prefix(weights, checkpoint.tensors).items():
        parameters[name].copy_(value)


def _write_kept(publication: Publication, model: nn.Module, adapters: Adapters | None, folder: Path) -> None:
    """The model of a step before the last, or its adapters alone."""
    folder.parent.mkdir(exist_ok=True)
    if adapters is not None:
        adapters.save(folder)
        return
    save_model(model, folder, eos_token_ids=publication.eos_token_ids, pad_token_id=publication.pad_token_id)


def _adapter_facts(adapters: Adapters, trained: int) -> dict[str, str]:
    return {"Parameters trained": f"{trained:,}", "Adapters": adapters.describe()}


def _write_weights(publication: Publication, model: nn.Module, adapters: Adapters | None, out: Path) -> None:
    ends: dict[str, Any] = {"eos_token_ids": publication.eos_token_ids, "pad_token_id": publication.pad_token_id}
    if adapters is not None:
        adapters.save(out / ADAPTER)
        if not adapters.config.merge:
            set_generation(model, **ends)
            return
        model = adapters.merge()
    save_model(model, out, **ends)


def _contract_hash(folder: Path) -> str | None:
    contract = Text.load(folder).contract
    return None if contract is None else contract.hash


def _summary(
    lines: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]], tokens_seen: int
) -> dict[str, Any]:
    return {
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
