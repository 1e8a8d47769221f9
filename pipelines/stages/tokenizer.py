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
from pipelines.corpus.clean import Rejected, decode
from pipelines.corpus.encode import Encoder, choose_backend
from pipelines.corpus.sources import Listing, SourceFile, check_rejected, hash_fraction, is_validation, list_source
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
    code_version: ClassVar[int] = 2

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
    rejected: list[Rejected] = [*listing.unreadable]
    training = [f for f in listing.files if not is_validation(f, config.split)]
    sample = list(_texts(listing, training, config.sample_bytes, rejected))
    check_rejected(
        len(rejected), len(listing.files) + len(listing.unreadable), config.source, next(iter(rejected), None)
    )
    if not sample:
        raise _no_text("to learn a tokenizer from", config.source)
    sample_bytes = sum(len(text.encode()) for text in sample)
    context.progress(Progress(0, sample_bytes / 1e6, "MB"))
    save_tokenizer(train_tokenizer(sample, config.vocab_size, config.algorithm), context.out)
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
    listings = {"source": listing, **{name: list_source(source) for name, source in config.measured_on.items()}}
    backend, _ = choose_backend(folder, [])
    encoder = Encoder.load(folder, backend)
    for name, found in listings.items():
        by_source[name] = measure(encoder, _held_out(found, config.split), unknown)
        if not by_source[name].tokens:
            raise _no_text(f"to measure a tokenizer on in {name}", config.measured_on.get(name, config.source))
    return {
        "vocab_size": encoder.vocab_size,
        **by_source["source"].figures(),
        "by_source": {name: fit.figures() for name, fit in by_source.items()},
        "special_tokens_from_text": escaping_specials(folder, encoder, unknown),
    }


def _held_out(listing: Listing, split: SplitConfig) -> Iterator[str]:
    """Text of the validation split, or of all where that is empty."""
    held_out = [f for f in listing.files if is_validation(f, split)]
    return _texts(listing, held_out or list(listing.files), _MEASURED_BYTES, [])


def _texts(listing: Listing, files: list[SourceFile], limit_bytes: int, rejected: list[Rejected]) -> Iterator[str]:
    """Texts in the order of a hash of their content until they make `limit_bytes`; unusable files go to `rejected`."""
    size = 0
    for file in sorted(files, key=lambda f: (hash_fraction("sample", f.blake3), f.name)):
        if size >= limit_bytes:
            return
        text = decode(file.name, listing.read(file))
        if isinstance(text, Rejected):
            rejected.append(text)
        elif text:
            size += file.size_bytes
            yield text
