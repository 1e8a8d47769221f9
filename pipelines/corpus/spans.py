"""Spans: the unit of work and of resumption when documents are encoded.

A span is a run of pieces of a source (`pipelines.corpus.pieces`). Encoding it reads, cleans, filters, splits, encodes
and writes in one pass, and ends with a commit record. Whatever was committed is never done again; the shards come from
the committed parts in the order of the plan. So they have the same bytes for any number of workers, any order of
completion and any kills.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from actors.store.artifacts import file_blake3, sync_file, sync_folder, write_durably
from configs.artifacts import hash_json
from configs.errors import RequestError, StorageError
from configs.schema.corpus import DedupConfig, SourceConfig, SplitConfig
from pipelines.corpus.chat import ChatEncoder, process_chat
from pipelines.corpus.contamination import Registered, drop_overlapping, process_gate
from pipelines.corpus.dedup import Fingerprints
from pipelines.corpus.documents import Documents, read_documents
from pipelines.corpus.encode import CHECKED_FRACTION, Backend, Encoder, Ids, process_encoder
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.pieces import Piece
from pipelines.corpus.shards import SPLITS, Tokens, document_schema, token_lists, write_batch
from pipelines.corpus.sources import Listing, is_validation

FINGERPRINTS = "fingerprints"


@dataclass(frozen=True)
class Span:
    """Some pieces of a source, and all that is needed to encode them anywhere."""

    number: int
    listing: Listing
    """Where the source is; without its files."""
    pieces: tuple[Piece, ...]
    source: SourceConfig
    split: SplitConfig
    tokenizer: Path
    tokenizer_digest: str
    backend: Backend
    dtype: str
    parts: Path
    """Folder of parts and commit records."""
    dedup: DedupConfig | None = None
    """What its documents are fingerprinted for."""
    evaluation: Registered | None = None
    """Evaluation sets that its training documents may not overlap with."""

    @property
    def key(self) -> str:
        """What decides the part's content."""
        pieces = [[p.file.name, p.file.blake3, p.begin, p.end] for p in self.pieces]
        source = self.source.model_dump(mode="json", exclude={"path", "include", "exclude", "max_bad_fraction"})
        dedup = None if self.dedup is None else self.dedup.model_dump()
        evaluation = None if self.evaluation is None else self.evaluation.digest
        encoding = [self.split.model_dump(), self.tokenizer_digest, self.backend, self.dtype]
        return hash_json([pieces, source, *encoding, dedup, evaluation])

    @property
    def size_bytes(self) -> int:
        """Bytes of stored files that the span stands for."""
        return sum(p.size_bytes for p in self.pieces)


class Commit(BaseModel):
    """Says that a span's parts are on disk, whole, and what became of everything that was read for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    parts: dict[str, str]
    """blake3 of each split's part, and of the fingerprints where there are any."""
    tokens: int
    ledger: Ledger
    checked: int
    """Documents that were encoded by both the backend and `tokenizers`."""
    differing: tuple[str, ...]
    """Names of those among them that the two encoded differently."""


def part_path(parts: Path, number: int, name: str) -> Path:
    """Where the part of span `number` is: a split's, or `FINGERPRINTS`."""
    return parts / f"{number:06d}-{name}.arrow"


def read_commit(parts: Path, number: int) -> Commit:
    """The commit record of span `number`. Raises `FileNotFoundError` or `ValueError` if there is none."""
    return Commit.model_validate_json((parts / f"{number:06d}.json").read_bytes())


def load_commit(span: Span) -> Commit | None:
    """The commit record of a span that was encoded before; None if there is none, or its parts are not what it says."""
    try:
        commit = read_commit(span.parts, span.number)
    except (FileNotFoundError, ValueError):
        return None
    paths = {split: part_path(span.parts, span.number, split) for split in commit.parts}
    whole = all(path.is_file() and file_blake3(path) == commit.parts[split] for split, path in paths.items())
    return commit if whole and commit.key == span.key else None


@dataclass
class _Part:
    """Documents of one split, gathered while a span is read."""

    columns: Documents = field(default_factory=Documents)
    """Without texts."""
    sizes: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    """Of many documents each."""

    def add(self, documents: Documents, encoded: dict[int, Ids], end_of_text_id: int, dtype: str) -> None:
        """Adds the rows of `documents` that are in `encoded`; the tokens of each are ended by end-of-text."""
        if not encoded:
            return
        self.columns.extend(documents, list(encoded))
        self.sizes.extend(len(documents.texts[row]) for row in encoded)
        end = np.array([end_of_text_id], dtype=np.uint32)
        ids = encoded.values()
        self.lengths.extend(len(i) + 1 for i in ids)
        self.tokens.append(np.concatenate([part for i in ids for part in (i, end)]).astype(dtype))

    def batch(self, span: Span) -> pa.RecordBatch:
        """All of it as Arrow columns."""
        labels = {"id": self.columns.ids, "source": self.columns.sources, "label": self.columns.labels}
        mapped = [label for label in labels if getattr(span.source.fields, label) is not None]
        columns = [
            pa.array(self.columns.names, pa.string()),
            pa.array(self.sizes, pa.uint64()),
            pa.array(self.columns.digests, pa.string()),
            *(pa.array(labels[label], pa.string()) for label in mapped),
            token_lists(self.tokens, self.lengths, span.dtype),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=document_schema(span.dtype, mapped))


def encode_span(span: Span) -> Commit:
    """Reads, cleans, filters, splits and encodes a span; writes its parts and, last, its commit record.

    Raises:
        ContractError: the documents are conversations, and the tokenizer has no chat template.
        DataError: a file changed since it was listed.
        StorageError: the parts cannot be written.
    """
    encoder = process_encoder(span.tokenizer, span.backend)
    chat = None if span.source.fields.messages is None else process_chat(span.tokenizer, span.backend)
    gate = None if span.evaluation is None else process_gate(span.evaluation)
    fingerprints = None if span.dedup is None else Fingerprints(span.dedup)
    parts: dict[str, _Part] = {split: _Part() for split in SPLITS}
    ledger = Ledger()
    checked = 0
    differing: list[str] = []
    for documents in read_documents(span.listing, span.pieces, span.source, ledger):
        held_out = [is_validation(digest, span.split) for digest in documents.digests]
        kept = range(len(held_out)) if gate is None else drop_overlapping(documents, held_out, gate, ledger)
        if chat is None:
            ids = {row: encoder.encode(documents.texts[row]) for row in kept}
        else:
            ids = _render(documents, kept, chat, ledger)
        if fingerprints is not None:
            for row in ids:
                fingerprints.add(documents.texts[row], "validation" if held_out[row] else "train")
        for split, part in parts.items():
            encoded = {row: i for row, i in ids.items() if held_out[row] == (split == "validation")}
            part.add(documents, encoded, encoder.end_of_text_id, span.dtype)
        twice = [] if span.backend == "tokenizers" else [row for row in ids if is_checked(documents.digests[row])]
        checked += len(twice)
        differing.extend(_differing(documents, twice, encoder, chat))
    return _commit(span, parts, fingerprints, ledger, checked, tuple(differing))


def _render(documents: Documents, rows: Iterable[int], chat: ChatEncoder, ledger: Ledger) -> dict[int, Ids]:
    """Tokens of some rows' conversations; those that the chat template refuses go to `ledger`."""
    found = {}
    for row in rows:
        try:
            found[row] = chat.encode(documents.conversations[row])
        except RequestError as error:
            ledger.reject(documents.names[row], error.what)
    return found


def is_checked(digest: str) -> bool:
    """Whether the document with this blake3 is one of the `CHECKED_FRACTION` that both backends encode."""
    return int(digest[:8], 16) < CHECKED_FRACTION * 2**32


def _differing(documents: Documents, rows: Iterable[int], encoder: Encoder, chat: ChatEncoder | None) -> Iterator[str]:
    """Names of the rows that the encoder's backends disagree on."""
    for row in rows:
        if chat is None:
            agrees = encoder.agrees(documents.texts[row].decode())
        else:
            agrees = chat.agrees(documents.conversations[row])
        if not agrees:
            yield documents.names[row]


def _commit(
    span: Span,
    parts: dict[str, _Part],
    fingerprints: Fingerprints | None,
    ledger: Ledger,
    checked: int,
    differing: tuple[str, ...],
) -> Commit:
    batches = {split: part.batch(span) for split, part in parts.items()}
    if fingerprints is not None:
        batches[FINGERPRINTS] = fingerprints.batch()
    written = {}
    try:
        for name, batch in batches.items():
            path = part_path(span.parts, span.number, name)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            write_batch(temporary, batch)
            sync_file(temporary)
            written[name] = file_blake3(temporary)
            temporary.replace(path)
        commit = Commit(
            key=span.key,
            parts=written,
            tokens=sum(sum(part.lengths) for part in parts.values()),
            ledger=ledger,
            checked=checked,
            differing=differing,
        )
        write_durably(span.parts / f"{span.number:06d}.json", commit.model_dump_json().encode())
        sync_folder(span.parts)
    except OSError as error:
        raise StorageError(
            f"cannot write to {span.parts}: {error.strerror or error}",
            next_step="free disk space or mend the permissions, then run the same command: committed spans are kept",
        ) from error
    return commit
