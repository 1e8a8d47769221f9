"""Stage `pretrain`: a decoder trained from scratch on one token corpus or a mixture of several."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from actors.store.artifacts import Artifact
from actors.text import Text
from configs.errors import CorruptArtifactError
from configs.schema.data import Phase
from configs.schema.training import PretrainConfig
from pipelines.corpus.loader import Loader, Rowing
from pipelines.corpus.shards import CorpusIndex
from pipelines.corpus.tokenizer import END_OF_TEXT_ID, END_OF_TURN, SPECIAL_TOKENS
from pipelines.stage import StageContext
from pipelines.training.launch import train_on_workers
from pipelines.training.models import build_model
from pipelines.training.objectives import CausalLanguageModel, Objective
from pipelines.training.publication import Publication, write_model
from pipelines.training.worker import Task

T = TypeVar("T")


class PretrainStage:
    """See `pipelines.stage.Stage`."""

    kind: ClassVar[str] = "pretrain"
    artifact_kind: ClassVar[str | None] = "model"
    code_version: ClassVar[int] = 2

    def sources(self, config: PretrainConfig) -> Mapping[str, str]:
        """Everything comes from the store."""
        return {}

    def run(self, config: PretrainConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Trains on the corpora; the tokenizer that goes with the model is the one they were made with.

        Raises:
            ContractError: they were made with different ones.
            DataError: a split of a corpus is too short.
        """
        corpora = corpora_of(inputs)
        folders = {name: corpus.path.absolute() for name, corpus in corpora.items()}
        indexes = context.work.absolute() / "indexes"
        data = _describe_data(open_split("train", folders, config, indexes), config)
        tokenizer = _tokenizer_of(next(iter(corpora.values())), context)
        Text.load(tokenizer.path)
        _log_lineage(corpora, config, context)
        assemble = functools.partial(assemble_pretraining, folders, config, indexes)
        train_on_workers(Task(context.work.absolute(), config.training, assemble), context)
        model, _ = assemble()
        digests = {f"Corpus {name} digest".replace("  ", " "): f"`{c.digest}`" for name, c in corpora.items()}
        publication = Publication(
            title="Language model pretrained from scratch",
            text_from=tokenizer.path,
            eos_token_ids=(END_OF_TEXT_ID, SPECIAL_TOKENS.index(END_OF_TURN)),
            pad_token_id=END_OF_TEXT_ID,
            facts={**digests, "Context length": f"{config.model.context_length:,} tokens"},
        )
        return {**write_model(publication, model, config.training, context), "data": data}


def assemble_pretraining(
    corpora: Mapping[str, Path], config: PretrainConfig, indexes: Path
) -> tuple[nn.Module, Objective]:
    """Model and objective of a pretraining run; runs on every worker."""
    index = CorpusIndex.load(next(iter(corpora.values())))
    model = build_model(
        config.model, vocab_size=index.vocab_size, eos_token_id=index.end_of_text_id, seed=config.training.seed
    )
    objective = CausalLanguageModel(
        open_split("train", corpora, config, indexes),
        {name: open_split("validation", {name: folder}, config, indexes) for name, folder in corpora.items()},
        row_tokens=config.model.context_length,
        validation_rows=config.training.eval_rows,
        within_documents=config.data.within_documents,
    )
    return model, objective


def corpora_of(inputs: Mapping[str, T]) -> dict[str, T]:
    """The inputs of a stage that are its corpora, by the names that its config gives them; "" if it gives none."""
    corpora = {role: one for role, one in inputs.items() if role.partition(".")[0] == "corpus"}
    return {role.partition(".")[2]: one for role, one in corpora.items()}


def open_split(split: str, corpora: Mapping[str, Path], config: PretrainConfig, indexes: Path | None = None) -> Loader:
    """The batches of a split of `corpora`; indexes of packings are kept below `indexes`. Raises as `mix` does."""
    mixture = config.data.mixture
    phases = mixture if mixture and len(corpora) > 1 else [Phase(weights=dict.fromkeys(corpora, 1))]
    rowing = Rowing(split, config.model.context_length, config.data.packing, indexes)
    return Loader.mix(corpora, phases, rowing, batch_rows=config.training.batch_rows, seed=config.training.seed)


def _describe_data(train: Loader, config: PretrainConfig) -> dict[str, Any]:
    """What the packing does to each corpus, and how much of it the run sees."""
    samples = train.samples(config.training.steps)
    corpora = {
        name or "corpus": {
            "samples": samples[name],
            "epochs": round(samples[name] / packing.rows, 4),
            "rows": packing.rows,
            "utilisation": round(packing.utilisation, 6),
            "truncation": round(packing.truncation, 6),
            "padding_tokens": packing.padding,
            "dropped_tokens": packing.dropped,
        }
        for name, packing in train.packing_reports().items()
    }
    return {"packing": config.data.packing, "within_documents": config.data.within_documents, "corpora": corpora}


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


def _log_lineage(corpora: Mapping[str, Artifact], config: PretrainConfig, context: StageContext) -> None:
    context.run.log_params(config.model_dump(mode="json"))
    for corpus in corpora.values():
        index = CorpusIndex.load(corpus.path)
        for split, used_for in (("train", "training"), ("validation", "validation")):
            record = index.splits[split]
            profile = {"tokens": record.tokens, "documents": record.documents, "text_bytes": record.text_bytes}
            context.run.log_dataset(
                name=f"{corpus.ref}:{split}", digest=corpus.digest, uri=str(corpus.ref), context=used_for,
                profile=profile,
            )  # fmt: skip
