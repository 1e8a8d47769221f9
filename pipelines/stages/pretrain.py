"""Stage `pretrain`: a language model trained on a token corpus, with the objective of its family."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from actors.store.artifacts import Artifact
from actors.text import Text, make_contract
from configs.errors import ContractError, CorruptArtifactError
from configs.schema.training import PretrainConfig, TrainingConfig
from pipelines.corpus.loader import Loader
from pipelines.corpus.shards import CorpusIndex
from pipelines.corpus.tokenizer import END_OF_TEXT_ID, END_OF_TURN, SPECIAL_TOKENS
from pipelines.stage import StageContext
from pipelines.training.denoising import Denoising
from pipelines.training.launch import train_on_workers
from pipelines.training.masked import MaskedLanguageModel
from pipelines.training.masks import mask_ids
from pipelines.training.models import Head
from pipelines.training.objectives import CausalLanguageModel, Objective
from pipelines.training.publication import Publication, write_model
from pipelines.training.start import Start, start_sources
from pipelines.training.worker import Task


class PretrainStage:
    """See `pipelines.stage.Stage`."""

    kind: ClassVar[str] = "pretrain"
    artifact_kind: ClassVar[str | None] = "model"
    code_version: ClassVar[int] = 2

    def sources(self, config: PretrainConfig) -> Mapping[str, str]:
        """Digest of the folder that training starts from, where there is one."""
        return start_sources(config.model)

    def run(self, config: PretrainConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Trains on the corpus; the tokenizer that goes with the model is the one the corpus was made with.

        Raises:
            ContractError: the model that training starts from has another tokenizer, or its objective needs mask
                tokens that the tokenizer lacks.
        """
        corpus = inputs["corpus"]
        tokenizer = _tokenizer_of(corpus, context)
        Text.load(tokenizer.path)
        start = Start.find(config.model, inputs)
        _check_contract(start, corpus)
        head = start.language_head
        masks = () if head == "causal" else mask_ids(tokenizer.path)
        _log_lineage(corpus, config, context)
        assemble = functools.partial(
            assemble_pretraining, corpus.path.absolute(), start, config.training, head=head, masks=masks
        )
        train_on_workers(Task(context.work.absolute(), config.training, assemble), context)
        model, _ = assemble()
        publication = Publication(
            title="Pretrained language model",
            head=head,
            text_from=tokenizer.path,
            eos_token_ids=(END_OF_TEXT_ID, SPECIAL_TOKENS.index(END_OF_TURN)),
            pad_token_id=END_OF_TEXT_ID,
            facts={
                **start.facts(),
                "Corpus digest": f"`{corpus.digest}`",
                "Context length": f"{start.context_length:,} tokens",
            },
        )
        return write_model(publication, model, config.training, context)


def assemble_pretraining(
    corpus: Path, start: Start, training: TrainingConfig, *, head: Head, masks: tuple[int, ...]
) -> tuple[nn.Module, Objective[Any]]:
    """Model and objective of a pretraining run; runs on every worker."""
    length = start.context_length
    index = CorpusIndex.load(corpus)
    model = start.model(head, vocab_size=index.vocab_size, eos_token_id=index.end_of_text_id, seed=training.seed)
    train, validation = (
        Loader.open(corpus, split=split, row_tokens=length, batch_rows=training.batch_rows, seed=training.seed)
        for split in ("train", "validation")
    )
    if head == "causal":
        return model, CausalLanguageModel(train, validation, row_tokens=length, validation_rows=training.eval_rows)
    if head == "masked":
        return model, MaskedLanguageModel(
            train, validation, row_tokens=length, validation_rows=training.eval_rows, seed=training.seed,
            mask_id=masks[0], end_of_text_id=index.end_of_text_id,
        )  # fmt: skip
    return model, Denoising(
        train, validation, style="spans" if model.config.model_type == "t5" else "whole", row_tokens=length,
        validation_rows=training.eval_rows, seed=training.seed, mask_ids=masks, end_of_text_id=index.end_of_text_id,
    )  # fmt: skip


def _check_contract(start: Start, corpus: Artifact) -> None:
    """A model that stands is trained on only with the tokenizer that it knows."""
    if start.folder is None:
        return
    expected = CorpusIndex.load(corpus.path).contract
    found = (Text.load(start.folder).contract or make_contract(start.folder)).hash
    if found != expected:
        raise ContractError(
            f"{start.config.start} cannot be trained on {corpus.ref}: the corpus was made with another tokenizer",
            received=f"text contract {found}",
            allowed=f"text contract {expected}",
            next_step="make the corpus with the model's tokenizer (tokenizer.existing)",
        )


def _tokenizer_of(corpus: Artifact, context: StageContext) -> Artifact:
    record = corpus.manifest.inputs["tokenizer"]
    tokenizer = context.store.get(record.ref)
    if tokenizer.digest != record.digest:
        raise CorruptArtifactError(
            f"{corpus.ref} was made with another {record.ref} than the one in the store",
            received=tokenizer.digest,
            allowed=record.digest,
            next_step="run the recipe's corpus stage again",
        )
    return tokenizer


def _log_lineage(corpus: Artifact, config: PretrainConfig, context: StageContext) -> None:
    index = CorpusIndex.load(corpus.path)
    context.run.log_params(config.model_dump(mode="json"))
    for split, used_for in (("train", "training"), ("validation", "validation")):
        record = index.splits[split]
        profile = {"tokens": record.tokens, "documents": record.documents, "text_bytes": record.text_bytes}
        context.run.log_dataset(
            name=f"{corpus.ref}:{split}", digest=corpus.digest, uri=str(corpus.ref), context=used_for, profile=profile
        )
