"""Stage `compare`: decoders of any architecture side by side on one corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from actors.store.artifacts import Artifact
from actors.text import Text
from configs.errors import ArtifactError, ContractError, DataError
from configs.schema.comparison import CompareConfig
from configs.schema.corpus import SourceConfig
from pipelines.corpus.account import Account
from pipelines.corpus.documents import read_documents
from pipelines.corpus.encode import agreeing_encoder
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.loader import Loader
from pipelines.corpus.pieces import plan_spans
from pipelines.corpus.shards import CorpusIndex
from pipelines.corpus.sources import list_source
from pipelines.evaluation.positions import (
    doubling_means,
    draw_comparison,
    nats_by_position,
    nats_of_stream,
    window_starts,
)
from pipelines.stage import Progress, StageContext
from pipelines.training.models import context_length, load_model, parameter_count
from pipelines.training.publication import CURVE

_SPAN_BYTES = 8 << 20


@dataclass(frozen=True)
class _Stream:
    """A text as one row of tokens: the end of text, and each document with the end of text behind it."""

    tokens: npt.NDArray[np.int64]
    words: int
    """What stands between white space, and one for the end of each document."""

    def windows(self, length: int) -> int:
        """How many of `length` tokens it is read in."""
        return len(window_starts(len(self.tokens), length))


class CompareStage:
    """Publishes report.json and comparison.png: both curves, and the perplexity by position in the context."""

    kind: ClassVar[str] = "compare"
    artifact_kind: ClassVar[str | None] = "report"
    code_version: ClassVar[int] = 2

    def sources(self, config: CompareConfig) -> Mapping[str, str]:
        """Digest of the text that perplexity per word is measured on, where there is one."""
        return {} if config.text is None else {"text": list_source(config.text).digest}

    def run(self, config: CompareConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Reads the same validation rows, and the same text, with every model.

        Raises:
            ArtifactError: a model does not say how it learned.
            ContractError: a model has another tokenizer than the corpus.
            DataError: there is no text in `text`, or too much of it is unusable.
        """
        corpus = inputs["corpus"]
        models = {label: inputs[f"models.{label}"] for label in config.models}
        for label, model in models.items():
            _check(label, model, corpus)
        length = min(context_length(model.path) for model in models.values())
        loader = Loader.open(corpus.path, split="validation", row_tokens=length, batch_rows=1, seed=0)
        rows = loader.rows(config.rows)
        stream = None if config.text is None else _read(config.text, next(iter(models.values())))
        work = len(rows) + (0 if stream is None else stream.windows(length))
        report: dict[str, Any] = {"rows": len(rows), "row_tokens": length, "models": {}}
        if stream is not None:
            report["text"] = {"words": stream.words, "tokens": len(stream.tokens) - 1}
        curves: dict[str, Any] = {}
        positions: dict[str, list[float]] = {}
        for number, (label, artifact) in enumerate(models.items()):

            def read(done: int, before: int = number * work) -> None:
                context.progress(Progress(before + done, len(models) * work, "rows"))

            model = load_model(artifact.path)
            positions[label] = nats_by_position(model, rows, read).tolist()
            curves[label] = json.loads((artifact.path / CURVE).read_bytes())
            nats = math.fsum(positions[label]) / length
            report["models"][label] = {
                "digest": artifact.digest,
                "parameters": parameter_count(model),
                "nats_per_token": nats,
                "perplexity": math.exp(nats),
                "bits_per_byte": nats / math.log(2) / loader.bytes_per_token,
                "perplexity_by_position": doubling_means(positions[label]),
                "curve": curves[label],
            }
            if stream is not None:

                def go_on(done: int, read: Callable[[int], None] = read) -> None:
                    read(len(rows) + done)

                total = nats_of_stream(model, stream.tokens, length, go_on)
                report["models"][label]["word_perplexity"] = math.exp(total / stream.words)
        draw_comparison(curves, positions, context.out / "comparison.png")
        return {"rows": len(rows), "row_tokens": length, "models": _publish(report, context)}


def _publish(report: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Writes the report and logs it; the figures of each model."""
    (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    context.run.log_file(context.out / "comparison.png")
    shown = ("parameters", "perplexity", "word_perplexity", "bits_per_byte")
    figures = {label: {k: m[k] for k in shown if k in m} for label, m in report["models"].items()}
    context.run.log_metrics({f"{label}/{k}": v for label, m in figures.items() for k, v in m.items()}, step=0)
    return figures


def _read(source: SourceConfig, model: Artifact) -> _Stream:
    listing = list_source(source)
    ledger, account = Ledger(), Account()
    texts = [
        text.decode()
        for span in plan_spans(listing, source, _SPAN_BYTES)
        for documents in read_documents(listing, span, source, ledger)
        for text in documents.texts
    ]
    account.reject(listing.unreadable)
    account.add(ledger)
    account.check(len(listing.files) + len(listing.unreadable), source)
    if not texts:
        raise DataError("compare.text holds no text", received=source.path, next_step="correct compare.text.path")
    encoder = agreeing_encoder(model.path, texts[:1])
    end = np.array([encoder.end_of_text_id], dtype=np.int64)
    ids = [part for text in texts for part in (encoder.encode(text).astype(np.int64), end)]
    return _Stream(np.concatenate([end, *ids]), sum(len(text.split()) + 1 for text in texts))


def _check(label: str, model: Artifact, corpus: Artifact) -> None:
    contract = Text.load(model.path).contract
    expected = CorpusIndex.load(corpus.path).contract
    if contract is None or contract.hash != expected:
        raise ContractError(
            f"models.{label} cannot be read on {corpus.ref}: it has another tokenizer",
            received=None if contract is None else contract.hash,
            allowed=expected,
            next_step="compare models made with the corpus's tokenizer",
        )
    if not (model.path / CURVE).exists():
        raise ArtifactError(
            f"models.{label} does not say how it learned",
            received=str(model.ref),
            allowed=f"a model with {CURVE}, as pretrain and finetune publish it",
            next_step="train it again",
        )
