"""Stage `tokenizer`: learn a vocabulary from a source, or take an existing one, and pin the text contract."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from actors.store.artifacts import Artifact
from actors.text import CONTRACT, make_contract
from configs.errors import DataError
from configs.schema.corpus import SourceConfig, SplitConfig, TokenizerConfig
from pipelines.corpus.account import Account
from pipelines.corpus.documents import sample_texts
from pipelines.corpus.encode import agreeing_encoder
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.sources import Listing, is_validation, list_source
from pipelines.corpus.tokenizer import save_tokenizer, train_tokenizer
from pipelines.corpus.vocabulary import (
    Fit,
    copy_existing,
    escaping_specials,
    existing_digest,
    measure,
    unknown_id,
)
from pipelines.stage import Progress, StageContext

_MEASURED_BYTES = 4_000_000
"""Held-out text of a source that the fit is measured on."""


class TokenizerStage:
    """Trains on documents of the training split, taken in the order of a hash until `sample_bytes` are reached."""

    kind: ClassVar[str] = "tokenizer"
    artifact_kind: ClassVar[str | None] = "tokenizer"
    code_version: ClassVar[int] = 3

    def sources(self, config: TokenizerConfig) -> Mapping[str, str]:
        """Digests of the sources, and of the existing tokenizer where there is one."""
        digests = {"source": list_source(config.source).digest}
        for name, source in config.measured_on.items():
            digests[f"measured_on.{name}"] = list_source(source).digest
        if config.existing is not None:
            digests["existing"] = existing_digest(_folder(config.existing))
        return digests

    def run(self, config: TokenizerConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Writes the tokenizer, its contract and a report.

        Raises:
            ContractError: the existing tokenizer cannot be used.
            DataError: there is no text to learn from or to measure on, or too much of a source is unusable.
        """
        started = time.monotonic()
        listing = list_source(config.source)
        if config.existing is None:
            learned = _train(config, listing, context)
        else:
            copy_existing(_folder(config.existing), context.out, config.end_of_text)
            learned = {"algorithm": "existing"}
        contract = make_contract(context.out)
        (context.out / CONTRACT).write_text(contract.model_dump_json(indent=2) + "\n", encoding="utf-8")
        report = {**learned, **_fit(config, listing, context.out), "contract": contract.hash}
        (context.out / "report.json").write_text(
            json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        figures = ("vocab_size", "bytes_per_token", "unknown_rate", "fertility")
        context.run.log_metrics({f"tokenizer/{name}": float(report[name]) for name in figures}, step=0)
        return {**report, "seconds": time.monotonic() - started}


def _folder(existing: str) -> Path:
    return Path(existing).expanduser()


def _train(config: TokenizerConfig, listing: Listing, context: StageContext) -> dict[str, Any]:
    ledger, account = Ledger(), Account()
    wanted = sample_texts(
        listing, config.source, "sample", config.sample_bytes, ledger, lambda d: not is_validation(d, config.split)
    )
    sample = [text.decode() for text in wanted]
    account.reject(listing.unreadable)
    account.add(ledger)
    account.check(len(listing.files) + len(listing.unreadable), config.source)
    if not sample:
        raise _no_text("to learn a tokenizer from", config.source)
    sample_bytes = sum(len(text.encode()) for text in sample)
    context.progress(Progress(0, sample_bytes / 1e6, "MB"))
    save_tokenizer(train_tokenizer(sample, config.vocab_size, config.algorithm, config.masks), context.out)
    context.progress(Progress(sample_bytes / 1e6, sample_bytes / 1e6, "MB"))
    return {"algorithm": config.algorithm, "sample_documents": len(sample), "sample_bytes": sample_bytes}


def _no_text(purpose: str, source: SourceConfig) -> DataError:
    return DataError(
        f"no text {purpose}", received=source.path,
        allowed="a source with text in its training split",
        next_step="correct source.path, or lower split.validation_fraction",
    )  # fmt: skip


def _fit(config: TokenizerConfig, listing: Listing, folder: Path) -> dict[str, Any]:
    """How the tokenizer fits held-out text of each source, as its backend encodes it."""
    by_source: dict[str, Fit] = {}
    unknown = unknown_id(folder)
    sources = {"source": config.source, **config.measured_on}
    encoder = agreeing_encoder(folder)
    for name, source in sources.items():
        found = listing if name == "source" else list_source(source)
        by_source[name] = measure(encoder, _held_out(found, source, config.split), unknown)
        if not by_source[name].tokens:
            raise _no_text(f"to measure a tokenizer on in {name}", source)
    return {
        "vocab_size": encoder.vocab_size,
        **by_source["source"].figures(),
        "by_source": {name: fit.figures() for name, fit in by_source.items()},
        "special_tokens_from_text": escaping_specials(folder, encoder, unknown),
    }


def _held_out(listing: Listing, source: SourceConfig, split: SplitConfig) -> Iterator[str]:
    """Text of the validation split, or of all where that is empty."""
    for wanted in (lambda digest: is_validation(digest, split), lambda digest: True):
        found = False
        for text in sample_texts(listing, source, "sample", _MEASURED_BYTES, Ledger(), wanted):
            found = True
            yield text.decode()
        if found:
            return
