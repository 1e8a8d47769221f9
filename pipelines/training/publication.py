"""A finished run as the files of a model artifact, equal for equal weights: no times, no host names, no paths."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.recurrent import LstmConfig
from configs.schema.training import TrainingConfig
from pipelines.stage import StageContext
from pipelines.training.adapters import ADAPTER, Adapters
from pipelines.training.checkpoint import Checkpoints, without_prefix
from pipelines.training.curve import draw_curve
from pipelines.training.loop import AVERAGE
from pipelines.training.metrics import FILE, STEP_FIGURES, read_metrics
from pipelines.training.models import AUTO_CLASSES, Head, parameter_count, save_model, set_generation, trained_count
from pipelines.training.worker import CHECKPOINTS, HARDWARE

_TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "contract.json"
)  # fmt: skip


CURVE = "curve.json"
"""The figures of every logged step that do not depend on the clock."""
_TIMED = ("time_ms", "tokens_per_second", "mfu", "data_wait_fraction")
_HUB_TAGS: dict[Head, str] = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "seq2seq": "text2text-generation",
    "classify": "text-classification",
    "tag": "token-classification",
}
"""What the Hugging Face hub calls the task of each kind of model."""


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


def write_model(
    publication: Publication,
    model: nn.Module,
    config: TrainingConfig,
    context: StageContext,
    *,
    adapters: Adapters | None = None,
) -> dict[str, Any]:
    """Writes the model artifact of a finished run to `context.out`, its curve into the tracker; returns the summary.

    `model` gives the architecture; its weights are replaced by those of the last checkpoint, or by their average if the
    run kept one. `adapters` that are
    attached to it are written too, and the model itself only if they are to be merged into it, which they then are.
    """
    checkpoint = Checkpoints(context.work / CHECKPOINTS).load(config.steps)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        weights = AVERAGE if config.ema_decay is not None else "model"
        for name, value in without_prefix(weights, checkpoint.tensors).items():
            parameters[name].copy_(value)
    trained = trained_count(model)
    _write_weights(publication, model, adapters, context.out)
    sizes = {"parameters": parameter_count(model), "trained_parameters": trained}
    for name in _TEXT_FILES:
        if (publication.text_from / name).exists():
            shutil.copyfile(publication.text_from / name, context.out / name)
    lines = [line for line in read_metrics(context.work / FILE) if "step" in line]
    draw_curve(lines, context.out / "loss.png", title=publication.title)
    curve = [{name: value for name, value in line.items() if name not in _TIMED} for line in lines]
    (context.out / CURVE).write_text(json.dumps(curve) + "\n")
    context.run.log_file(context.out / "loss.png")
    scored = [line for line in lines if "validation_loss" in line]
    facts = {
        **publication.facts,
        "Parameters": f"{sizes['parameters']:,}",
        **({} if adapters is None else _adapter_facts(adapters, trained)),
        "Optimizer steps": f"{config.steps:,}",
        "Targets seen": f"{checkpoint.tokens_seen:,}",
        **{_named(name): f"{value:.4f}" for name, value in _evaluated(scored[-1]).items()},
    }
    (context.out / "README.md").write_text(_card(publication, model, adapters, facts), encoding="utf-8")
    hardware = json.loads((context.work / HARDWARE).read_bytes())
    return {**sizes, **_summary(lines, scored, checkpoint.tokens_seen), **hardware}


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


def _named(figure: str) -> str:
    """A figure's name for people; losses are in nats per target."""
    return figure.replace("_", " ").capitalize()


def _card(publication: Publication, model: nn.Module, adapters: Adapters | None, facts: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    merged = adapters is None or adapters.config.merge
    auto = AUTO_CLASSES[publication.head].__name__
    first = "After `import actors.recurrent` it" if model.config.model_type == LstmConfig.model_type else "It"
    opens = [f"{first} opens with `{auto}.from_pretrained` and `AutoTokenizer.from_pretrained`."] if merged else []
    if adapters is not None:
        opens.append(f'The adapters alone open with `PeftModel.from_pretrained(base, ".../{ADAPTER}")`.')
    return (
        f"---\nlibrary_name: {'transformers' if merged else 'peft'}\n"
        f"pipeline_tag: {_HUB_TAGS[publication.head]}\n---\n\n"
        f"# {publication.title}\n\n|  |  |\n|---|---|\n{rows}\n\n![Loss over the steps](loss.png)\n\n"
        + "\n".join(opens)
        + "\n"
    )
