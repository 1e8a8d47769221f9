"""Training on labelled examples, from the dataset to the model folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from actors.store.artifacts import Artifact
from actors.text import Text
from configs.errors import DataError
from configs.schema.examples import Task as ExampleTask
from configs.schema.training import FinetuneConfig
from pipelines.corpus.examples import LABELS
from pipelines.evaluation.writing import text_scores, write_texts
from pipelines.stage import Progress, StageContext
from pipelines.training.adapters import Adapters
from pipelines.training.examples import ExampleRows, Framing, encode_examples, read_examples
from pipelines.training.launch import train_on_workers
from pipelines.training.models import Head
from pipelines.training.objectives import Objective, check_no_z_loss
from pipelines.training.publication import Publication, Scores, unscored, write_model
from pipelines.training.start import Start
from pipelines.training.tasks import Classification, ExampleObjective, Sequences, Tagging
from pipelines.training.worker import Task

_SPLITS = {"train": "training", "heldout": "validation"}
_OBJECTIVES: dict[Head, type[ExampleObjective]] = {
    "classify": Classification,
    "tag": Tagging,
    "seq2seq": Sequences,
}
_TITLES: dict[Head, str] = {
    "classify": "Text classifier",
    "tag": "Tagger of words",
    "seq2seq": "Model that writes a text for a text",
}


def train_on_examples(
    config: FinetuneConfig, start: Start, tokenizer: Path, data: Artifact, context: StageContext
) -> dict[str, Any]:
    """Encodes the dataset, trains on it and writes the model; one that writes texts is scored on held-out ones.

    Raises:
        DataError: the dataset is one of another task.
        ConfigError: a z-loss is asked for.
    """
    task, labels = _labels(data, config)
    check_no_z_loss(config.training, f"task {task}")
    text = Text.load(tokenizer)
    framing = Framing.load(tokenizer, classified=task != "seq2seq")
    rows = context.work.absolute() / "rows"
    rows.mkdir(exist_ok=True)
    for split in _SPLITS:
        encode_examples(
            data.path / f"{split}.jsonl", rows / f"{split}.safetensors", framing,
            task=task, labels=labels, row_tokens=start.context_length,
        )  # fmt: skip
    _log_lineage(data, rows, context)
    pad = text.pad_token_id if text.pad_token_id is not None else framing.end
    make = functools.partial(
        make_model, start, config, task, tuple(labels), vocab_size=text.vocab_size, end=framing.end
    )
    assemble = functools.partial(assemble_examples, make, rows, config, task, tuple(labels), pad=pad)
    skeleton = start.skeleton(task, vocab_size=text.vocab_size, eos_token_id=framing.end, labels=labels)
    if config.lora is not None:
        Adapters.attach(skeleton, config.lora, head=task, seed=config.training.seed)
    row_tokens = max(ExampleRows.open(rows / f"{split}.safetensors").longest for split in _SPLITS)
    job = Task(context.work.absolute(), config.training, assemble)
    trained = train_on_workers(job, skeleton, row_tokens, context)
    model, adapters = make()
    publication = Publication(
        title=_TITLES[task],
        head=task,
        text_from=tokenizer,
        eos_token_ids={framing.end, *text.eos_token_ids},
        pad_token_id=pad,
        facts={**start.facts(), **_facts(data, rows, labels)},
        framing=framing,
    )
    score = functools.partial(_score_writing, config, data, rows, text, pad, context)
    summary = write_model(
        publication, model, config.training, context, adapters=adapters, score=score if task == "seq2seq" else unscored
    )
    truncated = {split: ExampleRows.open(rows / f"{split}.safetensors").truncated for split in _SPLITS}
    return {**summary, **trained, "truncated": truncated}


def make_model(
    start: Start, config: FinetuneConfig, task: ExampleTask, labels: Sequence[str], *, vocab_size: int, end: int
) -> tuple[nn.Module, Adapters | None]:
    """The model that is trained, and the adapters that are attached to it, if any; equal at every call."""
    seed = config.training.seed
    model = start.model(task, vocab_size=vocab_size, eos_token_id=end, seed=seed, labels=labels)
    if config.lora is None:
        return model, None
    return model, Adapters.attach(model, config.lora, head=task, seed=seed)


def assemble_examples(
    make: Callable[[], tuple[nn.Module, Adapters | None]],
    rows: Path,
    config: FinetuneConfig,
    task: ExampleTask,
    labels: Sequence[str],
    *,
    pad: int,
) -> tuple[nn.Module, Objective[Any]]:
    """Model and objective of a run on labelled examples; runs on every worker."""
    training = config.training
    train, heldout = (ExampleRows.open(rows / f"{split}.safetensors") for split in _SPLITS)
    objective = _OBJECTIVES[task](
        train, heldout, labels=labels, batch_rows=training.batch_rows, seed=training.seed,
        validation_rows=training.eval_rows, pad=pad,
    )  # fmt: skip
    return make()[0], objective


def _labels(data: Artifact, config: FinetuneConfig) -> tuple[ExampleTask, list[str]]:
    path = data.path / LABELS
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"task": "pairs"}
    if found["task"] != config.task:
        raise DataError(
            f"{data.ref} is a dataset of another task than finetune.task",
            received=found["task"],
            allowed=config.task,
            next_step="set task of the finetune stage, or of the examples stage",
        )
    return found["task"], found["labels"]


def _facts(data: Artifact, rows: Path, labels: Sequence[str]) -> dict[str, str]:
    """What the model's card says of its data."""
    train, heldout = (len(ExampleRows.open(rows / f"{split}.safetensors")) for split in _SPLITS)
    return {
        "Data": f"`{data.ref}`: {train:,} training examples, {heldout:,} held out",
        "Data digest": f"`{data.digest}`",
        **({"Labels": ", ".join(labels)} if labels else {}),
    }


def _log_lineage(data: Artifact, rows: Path, context: StageContext) -> None:
    for split, used_for in _SPLITS.items():
        found = ExampleRows.open(rows / f"{split}.safetensors")
        profile = {"examples": len(found), "targets": found.targets, "longest_row_tokens": found.longest}
        context.run.log_dataset(
            name=f"{data.ref}:{split}", digest=data.digest, uri=str(data.ref), context=used_for, profile=profile
        )


def _score_writing(
    config: FinetuneConfig, data: Artifact, rows: Path, text: Text, pad: int, context: StageContext, model: nn.Module
) -> Scores:
    """Has the new `model` write the first held-out texts, keeps them in predictions.jsonl, and scores them."""
    heldout = ExampleRows.open(rows / "heldout.safetensors")
    count = min(config.training.eval_rows, len(heldout))
    records = [record for _, record in read_examples(data.path / "heldout.jsonl")][:count]
    ids = write_texts(
        model,
        [heldout[index][0].tolist() for index in range(count)],
        pad=pad,
        max_new_tokens=config.generated_tokens,
        progress=lambda done: context.progress(Progress(done, count, "texts")),
    )
    written = [text.decode(line).strip() for line in ids]
    scores, signatures = text_scores([record["completion"] for record in records], written)
    lines = (
        json.dumps({**record, "written": line}, ensure_ascii=False) + "\n"
        for record, line in zip(records, written, strict=True)
    )
    (context.out / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    context.run.log_metrics({f"heldout/{name}": value for name, value in scores.items()}, step=config.training.steps)
    return Scores({**scores, "texts_scored": count}, signatures)
