"""Token shards: Arrow IPC files of documents, and an index with checksums.

A shard is one record batch with the columns of `document_schema`; the tokens of its documents lie one after the other
in one flat little-endian array, each document ended by the end-of-text token, so that a memory map of the file is the
token stream. The index holds an xxh3 of every block of `BLOCK_BYTES` of each file; `pipelines.corpus.reading` checks a
block when it is first read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from configs.errors import ArtifactError, CorruptArtifactError

INDEX = "index.json"
BLOCK_BYTES = 1 << 18
Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardRecord(_Record):
    """One shard file; `path` is relative to the index."""

    path: str
    documents: int
    tokens: int
    size_bytes: int
    blocks: tuple[str, ...]
    """xxh3-64 of each block of the file, hex."""


class SplitRecord(_Record):
    """The shards of a split, in the order of their documents."""

    documents: int
    tokens: int
    """End-of-text tokens included."""
    text_bytes: int
    shards: tuple[ShardRecord, ...]

    @classmethod
    def of(cls, shards: Sequence[ShardRecord], text_bytes: int) -> Self:
        """The record of a split of these shards."""
        return cls(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=text_bytes,
            shards=tuple(shards),
        )


class CheckedSet(_Record):
    """An evaluation set that the training documents were compared with."""

    digest: str
    """Of its content, and of how it was read."""
    items: int
    unchecked_items: int
    """Too short to be told from any text."""
    ngrams: int
    words: int
    """In an n-gram."""
    dropped: int = 0
    """Training documents that held one of its passages and are not in the corpus."""
    kept: int = 0
    """Training documents that hold one of its passages and are in the corpus, unless as duplicates: a model that
    learned from it may not be scored on the set."""


class CorpusIndex(_Record):
    """What a reader of the shards has to know."""

    format: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    end_of_text_id: int
    contract: str
    """Hash of the text contract the tokens were made with."""
    block_bytes: int
    splits: dict[str, SplitRecord]
    checked: dict[str, CheckedSet] = Field(default_factory=dict)
    """By name. Of any other evaluation set it is not known whether the corpus holds it."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads the index of a corpus.

        Raises:
            ArtifactError: `folder` holds none.
            CorruptArtifactError: it does not parse.
        """
        path = folder / INDEX
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder} is not a corpus: it has no {INDEX}", next_step="give an artifact of the corpus stage"
            ) from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, path: str) -> Self:
        """The index that a file `path` with `content` holds. Raises `CorruptArtifactError` if it does not parse."""
        try:
            return cls.model_validate_json(content)
        except ValueError as error:
            raise CorruptArtifactError(
                f"{path} is not a corpus index: {error}", next_step="ganymede artifacts verify, then make it again"
            ) from error


def document_schema(dtype: str, labels: Sequence[str] = ()) -> pa.Schema:
    """Columns of a shard: the document's name in the source, the size and blake3 of its text, and its tokens.

    `labels` are what the source says of a document beside: its id, where it is from, a label.
    """
    return pa.schema(
        [
            pa.field("name", pa.string(), nullable=False),
            pa.field("size_bytes", pa.uint64(), nullable=False),
            pa.field("blake3", pa.string(), nullable=False),
            *(pa.field(label, pa.string()) for label in labels),
            pa.field("tokens", pa.large_list(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False))),
        ]
    )


def token_column(documents: list[Tokens], dtype: str) -> pa.Array:
    """The `tokens` column: one list a document."""
    return token_lists(documents, [len(d) for d in documents], dtype)


def token_lists(tokens: list[Tokens], lengths: list[int], dtype: str) -> pa.Array:
    """The `tokens` column of documents of these lengths, whose tokens lie one after the other in `tokens`."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    flat = np.concatenate(tokens) if tokens else np.empty(0)
    return pa.LargeListArray.from_arrays(
        pa.array(offsets), pa.array(flat.astype(dtype, copy=False)), type=document_schema(dtype).field("tokens").type
    )


class Run(NamedTuple):
    """Documents `begin` to `end` (exclusive) of one of several parts, by its place among them."""

    part: int
    begin: int
    end: int


def cut_shards(parts: Iterable[Lengths], shard_tokens: int) -> Iterator[list[Run]]:
    """What each shard of a split holds, given the tokens of every document of every part.

    A shard ends with the document that fills it, so the shards follow from the documents and `shard_tokens` alone.
    """
    pending: list[Run] = []
    room = shard_tokens
    for part, lengths in enumerate(parts):
        ends = np.cumsum(lengths, dtype=np.int64)
        begin = before = 0
        while (last := int(np.searchsorted(ends, before + room))) < len(ends):
            yield [*pending, Run(part, begin, last + 1)]
            pending, begin, before, room = [], last + 1, int(ends[last]), shard_tokens
        if begin < len(ends):
            pending.append(Run(part, begin, len(ends)))
            room -= int(ends[-1]) - before
    if pending:
        yield pending


def shard_name(split: str, number: int) -> str:
    """Where a shard lies, relative to the index."""
    return f"shards/{split}-{number:05d}.arrow"


def write_shard(path: Path, name: str, batch: pa.RecordBatch) -> ShardRecord:
    """Writes a shard at `path`, which is there whole or not at all; `name` is what its record calls it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_batch(temporary, batch)
    record = _describe(temporary, name, batch)
    temporary.replace(path)
    return record


def document_tokens(batch: pa.RecordBatch) -> Lengths:
    """Tokens of each document."""
    return np.diff(batch.column("tokens").offsets.to_numpy())


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Writes one record batch as an Arrow IPC file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_batch(path: Path) -> pa.RecordBatch:
    """The one record batch of an Arrow IPC file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _describe(path: Path, name: str, batch: pa.RecordBatch) -> ShardRecord:
    content = memoryview(pa.memory_map(str(path)).read_buffer())
    offsets = batch.column("tokens").offsets
    return ShardRecord(
        path=name,
        documents=batch.num_rows,
        tokens=offsets[-1].as_py() - offsets[0].as_py(),
        size_bytes=len(content),
        blocks=tuple(
            xxhash.xxh3_64_hexdigest(content[begin : begin + BLOCK_BYTES])
            for begin in range(0, len(content), BLOCK_BYTES)
        ),
    )
