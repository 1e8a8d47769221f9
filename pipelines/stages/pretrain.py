"""Stage `pretrain`: a decoder trained from scratch on a token corpus."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from actors.store.artifacts import Artifact
from actors.text import Text
from configs.errors import CorruptArtifactError
from configs.schema.training import PretrainConfig
from pipelines.corpus.loader import Loader
from pipelines.corpus.shards import CorpusIndex
from pipelines.corpus.tokenizer import END_OF_TEXT_ID, END_OF_TURN, SPECIAL_TOKENS
from pipelines.stage import StageContext
from pipelines.training.launch import train_on_workers
from pipelines.training.models import build_model
from pipelines.training.objectives import CausalLanguageModel, Objective
from pipelines.training.publication import Publication, write_model
from pipelines.training.worker import Task


class PretrainStage:
    """See `pipelines.stage.Stage`."""

    kind: ClassVar[str] = "pretrain"
    artifact_kind: ClassVar[str | None] = "model"
    code_version: ClassVar[int] = 2

    def sources(self, config: PretrainConfig) -> Mapping[str, str]:
        """Everything comes from the store."""
        return {}

    def run(self, config: PretrainConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Trains on the corpus; the tokenizer that goes with the model is the one the corpus was made with."""
        corpus = inputs["corpus"]
        tokenizer = _tokenizer_of(corpus, context)
        Text.load(tokenizer.path)
        _log_lineage(corpus, config, context)
        assemble = functools.partial(assemble_pretraining, corpus.path.absolute(), config)
        train_on_workers(Task(context.work.absolute(), config.training, assemble), context)
        model, _ = assemble()
        publication = Publication(
            title="Language model pretrained from scratch",
            text_from=tokenizer.path,
            eos_token_ids=(END_OF_TEXT_ID, SPECIAL_TOKENS.index(END_OF_TURN)),
            pad_token_id=END_OF_TEXT_ID,
            facts={"Corpus digest": f"`{corpus.digest}`", "Context length": f"{config.model.context_length:,} tokens"},
        )
        return write_model(publication, model, config.training, context)


def assemble_pretraining(corpus: Path, config: PretrainConfig) -> tuple[nn.Module, Objective]:
    """Model and objective of a pretraining run; runs on every worker."""
    training, length = config.training, config.model.context_length
    index = CorpusIndex.load(corpus)
    model = build_model(
        config.model, vocab_size=index.vocab_size, eos_token_id=index.end_of_text_id, seed=training.seed
    )
    loaders = [
        Loader.open(corpus, split=split, row_tokens=length, batch_rows=training.batch_rows, seed=training.seed)
        for split in ("train", "validation")
    ]
    return model, CausalLanguageModel(*loaders, row_tokens=length, validation_rows=training.eval_rows)


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
