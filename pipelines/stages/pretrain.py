"""Stage `pretrain`: a language model trained on token corpora, with the objective of its family."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from actors.store.artifacts import Artifact
from actors.text import Text, make_contract
from configs.errors import ConfigError, ContractError, CorruptArtifactError
from configs.schema.data import Phase
from configs.schema.training import PretrainConfig
from pipelines.corpus.loader import Loader, Rowing
from pipelines.corpus.shards import CorpusIndex
from pipelines.corpus.tokenizer import END_OF_TEXT_ID, END_OF_TURN, SPECIAL_TOKENS
from pipelines.stage import StageContext
from pipelines.training.denoising import Denoising
from pipelines.training.launch import train_on_workers
from pipelines.training.masked import MaskedLanguageModel
from pipelines.training.masks import mask_ids
from pipelines.training.models import Head
from pipelines.training.objectives import CausalLanguageModel, Objective, check_no_z_loss
from pipelines.training.publication import Publication, write_model
from pipelines.training.start import Start, start_sources
from pipelines.training.worker import Task

T = TypeVar("T")


class PretrainStage:
    """See `pipelines.stage.Stage`."""

    kind: ClassVar[str] = "pretrain"
    artifact_kind: ClassVar[str | None] = "model"
    code_version: ClassVar[int] = 4

    def sources(self, config: PretrainConfig) -> Mapping[str, str]:
        """Digest of the folder that training starts from, where there is one."""
        return start_sources(config.model)

    def run(self, config: PretrainConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Trains on the corpora; the tokenizer that goes with the model is the one they were made with.

        Raises:
            ConfigError: only decoders keep attention within documents, or have a z-loss.
            ContractError: the corpora were made with different tokenizers, the model that training starts from has
                another one, or its objective needs mask tokens that the tokenizer lacks.
            DataError: a split of a corpus is too short.
        """
        corpora = corpora_of(inputs)
        folders = {name: corpus.path.absolute() for name, corpus in corpora.items()}
        indexes = context.work.absolute() / "indexes"
        start = Start.find(config.model, inputs)
        head = start.language_head
        _check_data(config, head)
        rows = functools.partial(open_split, corpora=folders, config=config, row_tokens=start.context_length)
        data = _describe_data(rows("train", indexes=indexes), config)
        first = next(iter(corpora.values()))
        tokenizer = _tokenizer_of(first, context)
        Text.load(tokenizer.path)
        _check_contract(start, first)
        masks = () if head == "causal" else mask_ids(tokenizer.path)
        _log_lineage(corpora, config, context)
        assemble = functools.partial(assemble_pretraining, folders, start, config, indexes, head=head, masks=masks)
        index = CorpusIndex.load(first.path)
        skeleton = start.skeleton(head, vocab_size=index.vocab_size, eos_token_id=index.end_of_text_id)
        task = Task(context.work.absolute(), config.training, assemble)
        trained = train_on_workers(task, skeleton, start.context_length, context)
        model, _ = assemble()
        digests = {f"Corpus {name} digest".replace("  ", " "): f"`{c.digest}`" for name, c in corpora.items()}
        publication = Publication(
            title="Pretrained language model",
            head=head,
            text_from=tokenizer.path,
            eos_token_ids=(END_OF_TEXT_ID, SPECIAL_TOKENS.index(END_OF_TURN)),
            pad_token_id=END_OF_TEXT_ID,
            facts={**start.facts(), **digests},
        )
        return {**write_model(publication, model, config.training, context), **trained, "data": data}


def assemble_pretraining(
    corpora: Mapping[str, Path],
    start: Start,
    config: PretrainConfig,
    indexes: Path,
    *,
    head: Head,
    masks: tuple[int, ...],
) -> tuple[nn.Module, Objective[Any]]:
    """Model and objective of a pretraining run; runs on every worker."""
    length, training = start.context_length, config.training
    index = CorpusIndex.load(next(iter(corpora.values())))
    model = start.model(head, vocab_size=index.vocab_size, eos_token_id=index.end_of_text_id, seed=training.seed)
    train = open_split("train", corpora=corpora, config=config, row_tokens=length, indexes=indexes)
    validation = {
        name: open_split("validation", corpora={name: folder}, config=config, row_tokens=length, indexes=indexes)
        for name, folder in corpora.items()
    }
    if head == "causal":
        return model, CausalLanguageModel(
            train, validation, row_tokens=length, validation_rows=training.eval_rows,
            within_documents=config.data.within_documents, z_loss=training.z_loss,
        )  # fmt: skip
    if head == "masked":
        return model, MaskedLanguageModel(
            train, validation, row_tokens=length, validation_rows=training.eval_rows, seed=training.seed,
            mask_id=masks[0], end_of_text_id=index.end_of_text_id,
        )  # fmt: skip
    return model, Denoising(
        train, validation, style="spans" if model.config.model_type == "t5" else "whole", row_tokens=length,
        validation_rows=training.eval_rows, seed=training.seed, mask_ids=masks, end_of_text_id=index.end_of_text_id,
    )  # fmt: skip


def corpora_of(inputs: Mapping[str, T]) -> dict[str, T]:
    """The inputs of a stage that are its corpora, by the names that its config gives them; "" if it gives none."""
    corpora = {role: one for role, one in inputs.items() if role.partition(".")[0] == "corpus"}
    return {role.partition(".")[2]: one for role, one in corpora.items()}


def open_split(
    split: str, *, corpora: Mapping[str, Path], config: PretrainConfig, row_tokens: int, indexes: Path | None = None
) -> Loader:
    """The batches of a split of `corpora`; indexes of packings are kept below `indexes`. Raises as `mix` does."""
    mixture = config.data.mixture
    phases = mixture if mixture and len(corpora) > 1 else [Phase(weights=dict.fromkeys(corpora, 1))]
    rowing = Rowing(split, row_tokens, config.data.packing, indexes)
    return Loader.mix(corpora, phases, rowing, batch_rows=config.training.batch_rows, seed=config.training.seed)


def _check_data(config: PretrainConfig, head: Head) -> None:
    """Encoders and encoder-decoders see their rows whole, and have no z-loss."""
    if head != "causal":
        check_no_z_loss(config.training, f"a {head} language model")
    if head != "causal" and config.data.within_documents:
        raise ConfigError(
            "data.packing and data.attention: attention is kept within documents for decoders only",
            received=f"packing {config.data.packing} for a {head} language model",
            allowed="packing concat with attention row",
        )


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
