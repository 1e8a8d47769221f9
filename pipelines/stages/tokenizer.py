"""Stage `tokenizer`: learn a vocabulary from a source, and pin the text contract."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from actors.store.artifacts import Artifact
from actors.text import CONTRACT, make_contract
from configs.errors import DataError
from configs.schema.corpus import TokenizerConfig
from pipelines.corpus.clean import Rejected, decode
from pipelines.corpus.encode import Encoder
from pipelines.corpus.sources import Listing, SourceFile, check_rejected, hash_fraction, is_validation, list_source
from pipelines.corpus.tokenizer import save_tokenizer, train_tokenizer
from pipelines.stage import Progress, StageContext

_MEASURED_BYTES = 4_000_000
"""Held-out text that the compression is measured on."""


class TokenizerStage:
    """Trains on documents of the training split, taken in the order of a hash until `sample_bytes` are reached."""

    kind: ClassVar[str] = "tokenizer"
    artifact_kind: ClassVar[str | None] = "tokenizer"
    code_version: ClassVar[int] = 1

    def sources(self, config: TokenizerConfig) -> Mapping[str, str]:
        """Digest of the source."""
        return {"source": list_source(config.source).digest}

    def run(self, config: TokenizerConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Writes the tokenizer, its contract and a report.

        Raises:
            DataError: the training split holds no text, or too many files are unusable.
        """
        started = time.monotonic()
        listing = list_source(config.source)
        rejected: list[Rejected] = [*listing.unreadable]
        training = [f for f in listing.files if not is_validation(f, config.split)]
        sample = list(_texts(listing, training, config.sample_bytes, rejected))
        check_rejected(
            len(rejected), len(listing.files) + len(listing.unreadable), config.source, next(iter(rejected), None)
        )
        if not sample:
            raise DataError(
                "no text to learn a tokenizer from", received=config.source.path,
                allowed="a source with at least one file of text in its training split",
                next_step="correct source.path, or lower split.validation_fraction",
            )  # fmt: skip
        sample_bytes = sum(len(text.encode()) for text in sample)
        context.progress(Progress(0, sample_bytes / 1e6, "MB"))
        save_tokenizer(train_tokenizer(sample, config.vocab_size), context.out)
        context.progress(Progress(sample_bytes / 1e6, sample_bytes / 1e6, "MB"))
        contract = make_contract(context.out)
        (context.out / CONTRACT).write_text(contract.model_dump_json(indent=2) + "\n", encoding="utf-8")

        held_out = [f for f in listing.files if is_validation(f, config.split)]
        encoder = Encoder.load(context.out, "gigatoken")
        measured = list(_texts(listing, held_out or training, _MEASURED_BYTES, []))
        tokens = sum(len(encoder.encode(text)) for text in measured)
        report = {
            "vocab_size": encoder.vocab_size,
            "documents": len(sample),
            "sample_bytes": sample_bytes,
            "bytes_per_token": round(sum(len(text.encode()) for text in measured) / tokens, 4),
            "contract": contract.hash,
        }
        (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        return {**report, "seconds": time.monotonic() - started}


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
