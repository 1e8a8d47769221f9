"""Stage `finetune`: supervised training on a dataset, of pairs or of labelled examples."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from actors.store.artifacts import Artifact
from actors.text import Text
from configs.errors import ConfigError, ContractError
from configs.schema.training import FinetuneConfig
from pipelines.stage import StageContext
from pipelines.training.adapters import Adapters, check_base
from pipelines.training.launch import train_on_workers
from pipelines.training.models import context_length, load_model
from pipelines.training.objectives import Objective, SupervisedPairs
from pipelines.training.pairs import PairRows, render_pairs
from pipelines.training.publication import Publication, write_model
from pipelines.training.start import Start, start_sources
from pipelines.training.supervised import train_on_examples
from pipelines.training.worker import Task

_SPLITS = {"train": "training", "heldout": "validation"}


class FinetuneStage:
    """See `pipelines.stage.Stage`."""

    kind: ClassVar[str] = "finetune"
    artifact_kind: ClassVar[str | None] = "model"
    code_version: ClassVar[int] = 4

    def sources(self, config: FinetuneConfig) -> Mapping[str, str]:
        """Digest of the folder that training starts from, where there is one."""
        return start_sources(config.model)

    def run(self, config: FinetuneConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Trains on the dataset as its task asks, and writes the new model.

        Raises:
            ConfigError: adapters do not fit the model, or would be merged into quantised weights.
        """
        context.run.log_params(config.model_dump(mode="json"))
        start = Start.find(config.model, inputs)
        if config.lora is not None and start.folder is not None:
            check_base(start.folder, config.lora)
        if config.task == "pairs":
            return _finetune_on_pairs(config, start, inputs["data"], context)
        tokenizer = inputs["tokenizer"].path.absolute() if start.folder is None else start.folder
        return train_on_examples(config, start, tokenizer, inputs["data"], context)


def _finetune_on_pairs(config: FinetuneConfig, start: Start, data: Artifact, context: StageContext) -> dict[str, Any]:
    """Renders the pairs for the base model, trains on them, and writes the new model.

    Raises:
        ContractError: the base model has no token that ends a text, or, for conversations, no chat template.
    """
    base = start.folder
    if base is None:
        raise ConfigError("task pairs needs a model that stands", next_step="give model.from")
    text = Text.load(base)
    if not text.eos_token_ids or (config.chat and not text.has_chat_template):
        lacks = "a chat template" if text.eos_token_ids else "a token that ends texts"
        raise ContractError(
            f"{config.model.start} cannot be fine-tuned on these pairs: its tokenizer lacks {lacks}",
            allowed="a model whose tokenizer has it" + (", or chat: false" if text.eos_token_ids else ""),
        )
    rows = context.work.absolute() / "rows"
    left_out = _render(data, rows, text, row_tokens=context_length(base), chat=config.chat)
    _log_lineage(data, rows, context)
    assemble = functools.partial(assemble_finetuning, base, rows, config)
    skeleton = start.skeleton("causal", vocab_size=text.vocab_size, eos_token_id=min(text.eos_token_ids))
    if config.lora is not None:
        Adapters.attach(skeleton, config.lora, head="causal", seed=config.training.seed)
    row_tokens = max(PairRows.open(rows / f"{split}.safetensors").longest for split in _SPLITS) - 1
    task = Task(context.work.absolute(), config.training, assemble)
    trained = train_on_workers(task, skeleton, row_tokens, context)
    publication = Publication(
        title="Language model fine-tuned on instructions",
        head="causal",
        text_from=base,
        eos_token_ids=text.eos_token_ids,
        pad_token_id=text.pad_token_id if text.pad_token_id is not None else min(text.eos_token_ids),
        facts={**start.facts(), "Data digest": f"`{data.digest}`"},
    )
    model, adapters = finetuned_model(base, config)
    summary = write_model(publication, model, config.training, context, adapters=adapters)
    return {**summary, **trained, "pairs_left_out": left_out}


def assemble_finetuning(base: Path, rows: Path, config: FinetuneConfig) -> tuple[nn.Module, Objective[Any]]:
    """Model and objective of a fine-tuning run on pairs; runs on every worker."""
    training = config.training
    objective = SupervisedPairs(
        PairRows.open(rows / "train.safetensors"),
        PairRows.open(rows / "heldout.safetensors"),
        batch_rows=training.batch_rows,
        seed=training.seed,
        validation_rows=training.eval_rows,
        z_loss=training.z_loss,
    )
    return finetuned_model(base, config)[0], objective


def finetuned_model(base: Path, config: FinetuneConfig) -> tuple[nn.Module, Adapters | None]:
    """The base model, and the adapters that are attached to it, if any; equal at every call."""
    model = load_model(base, dropout=config.model.dropout)
    if config.lora is None:
        return model, None
    return model, Adapters.attach(model, config.lora, head="causal", seed=config.training.seed)


def _render(data: Artifact, rows: Path, text: Text, **options: Any) -> int:
    """Renders both splits; how many pairs were too long."""
    rows.mkdir(exist_ok=True)
    return sum(
        render_pairs(data.path / f"{split}.jsonl", rows / f"{split}.safetensors", text, **options) for split in _SPLITS
    )


def _log_lineage(data: Artifact, rows: Path, context: StageContext) -> None:
    for split, used_for in _SPLITS.items():
        pairs = PairRows.open(rows / f"{split}.safetensors")
        profile = {"pairs": len(pairs), "target_tokens": pairs.targets, "longest_row_tokens": pairs.longest}
        context.run.log_dataset(
            name=f"{data.ref}:{split}", digest=data.digest, uri=str(data.ref), context=used_for, profile=profile
        )
