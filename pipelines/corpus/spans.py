"""Spans: the unit of work and of resumption when documents are encoded.

A span is a run of files, in the order of their names, of about `span_bytes`; the plan follows from the listing alone.
Encoding a span reads, cleans, splits, encodes and writes in one pass, and ends with a commit record. Whatever was
committed is never done again; the shards come from the committed parts in the order of the plan. So they have the same
bytes for any number of workers, any order of completion and any kills.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from actors.store.artifacts import file_blake3, sync_file, sync_folder, write_durably
from configs.artifacts import hash_json
from configs.errors import StorageError
from configs.schema.corpus import SplitConfig
from pipelines.corpus.clean import Rejected, decode
from pipelines.corpus.encode import CHECKED_FRACTION, Backend, process_encoder
from pipelines.corpus.shards import SPLITS, Tokens, document_schema, read_batch, token_column, write_batch
from pipelines.corpus.sources import Listing, SourceFile, hash_fraction, is_validation


@dataclass(frozen=True)
class Span:
    """Some files of a source, and all that is needed to encode them anywhere."""

    number: int
    listing: Listing
    """The source's root, and this span's files alone."""
    split: SplitConfig
    tokenizer: Path
    tokenizer_digest: str
    backend: Backend
    dtype: str
    parts: Path
    """Folder of parts and commit records."""

    @property
    def key(self) -> str:
        """What decides the part's content."""
        files = [[f.name, f.blake3] for f in self.listing.files]
        return hash_json([files, self.split.model_dump(), self.tokenizer_digest, self.backend, self.dtype])


class Commit(BaseModel):
    """Says that a span's parts are on disk, whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    parts: dict[str, str]
    """blake3 of each split's part."""
    text_bytes: int
    tokens: int
    empty: int
    """Files without content; they become no document."""
    rejected: tuple[Rejected, ...]
    differing: tuple[str, ...]
    """Names of the documents that gigatoken and `tokenizers` encoded differently."""


def plan_spans(files: Sequence[SourceFile], span_bytes: int) -> list[tuple[SourceFile, ...]]:
    """Cuts `files` into runs that end with the file that reaches `span_bytes`."""
    spans: list[tuple[SourceFile, ...]] = []
    pending: list[SourceFile] = []
    size = 0
    for file in files:
        pending.append(file)
        size += file.size_bytes
        if size >= span_bytes:
            spans.append(tuple(pending))
            pending, size = [], 0
    return [*spans, tuple(pending)] if pending else spans


def part_path(parts: Path, number: int, split: str) -> Path:
    """Where the part of span `number` for `split` is."""
    return parts / f"{number:06d}-{split}.arrow"


def load_commit(span: Span) -> Commit | None:
    """The commit record of a span that was encoded before; None if there is none, or its parts are not what it says."""
    path = _commit_path(span)
    try:
        commit = Commit.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    paths = {split: part_path(span.parts, span.number, split) for split in commit.parts}
    whole = all(path.is_file() and file_blake3(path) == commit.parts[split] for split, path in paths.items())
    return commit if whole and commit.key == span.key else None


def _commit_path(span: Span) -> Path:
    return span.parts / f"{span.number:06d}.json"


@dataclass
class _Part:
    """Documents of one split, gathered while a span is read."""

    files: list[SourceFile] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)

    def batch(self, dtype: str) -> pa.RecordBatch:
        columns = [
            pa.array([f.name for f in self.files], pa.string()),
            pa.array([f.size_bytes for f in self.files], pa.uint64()),
            pa.array([f.blake3 for f in self.files], pa.string()),
            token_column(self.tokens, dtype),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=document_schema(dtype))


def encode_span(span: Span) -> Commit:
    """Reads, cleans, splits and encodes a span; writes its parts and, last, its commit record.

    Raises:
        DataError: a file changed since it was listed.
        StorageError: the parts cannot be written.
    """
    encoder = process_encoder(span.tokenizer, span.backend)
    parts: dict[str, _Part] = {split: _Part() for split in SPLITS}
    rejected: list[Rejected] = []
    differing: list[str] = []
    empty = 0
    for file in span.listing.files:
        text = decode(file.name, span.listing.read(file))
        if isinstance(text, Rejected):
            rejected.append(text)
            continue
        if not text:
            empty += 1
            continue
        ids = encoder.encode(text)
        if hash_fraction("check", file.blake3) < CHECKED_FRACTION and not encoder.agrees(text):
            differing.append(file.name)
        part = parts["validation" if is_validation(file, span.split) else "train"]
        part.files.append(file)
        part.tokens.append(np.append(ids.astype(span.dtype), np.array(encoder.end_of_text_id, dtype=span.dtype)))
    return _commit(span, parts, empty, tuple(rejected), tuple(differing))


def _commit(
    span: Span, parts: dict[str, _Part], empty: int, rejected: tuple[Rejected, ...], differing: tuple[str, ...]
) -> Commit:
    written = {}
    try:
        for split, part in parts.items():
            path = part_path(span.parts, span.number, split)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            write_batch(temporary, part.batch(span.dtype))
            sync_file(temporary)
            written[split] = file_blake3(temporary)
            temporary.replace(path)
        commit = Commit(
            key=span.key,
            parts=written,
            text_bytes=sum(f.size_bytes for part in parts.values() for f in part.files),
            tokens=sum(len(tokens) for part in parts.values() for tokens in part.tokens),
            empty=empty,
            rejected=rejected,
            differing=differing,
        )
        write_durably(_commit_path(span), commit.model_dump_json().encode())
        sync_folder(span.parts)
    except OSError as error:
        raise StorageError(
            f"cannot write to {span.parts}: {error.strerror or error}",
            next_step="free disk space or mend the permissions, then run the same command: committed spans are kept",
        ) from error
    return commit


def committed_documents(parts: Path, spans: int, split: str) -> Iterator[pa.RecordBatch]:
    """The documents of a split, span by span in the order of the plan."""
    for number in range(spans):
        yield read_batch(part_path(parts, number, split))
