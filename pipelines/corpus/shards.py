"""Token shards: Arrow IPC files of documents, and an index with checksums.

A shard is one record batch with the columns of `document_schema`; the tokens of its documents lie one after the other
in one flat little-endian array, each document ended by the end-of-text token, so that a memory map of the file is the
token stream. The index holds an xxh3 of every block of `BLOCK_BYTES` of each file; `pipelines.corpus.reading` checks a
block when it is first read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from configs.errors import ArtifactError, CorruptArtifactError

INDEX = "index.json"
BLOCK_BYTES = 1 << 18
_WRITERS = 2
"""Threads; gathering, writing and hashing a shard is done outside the interpreter."""
Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


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


def write_split(folder: Path, split: str, batches: Iterable[pa.RecordBatch], shard_tokens: int) -> SplitRecord:
    """Writes documents, in the order given, as `shards/<split>-NNNNN.arrow` below `folder`.

    A shard ends with the document that fills it, so the files depend on the documents and `shard_tokens` alone.
    """
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    written: list[tuple[ShardRecord, int]] = []
    waiting: deque[Future[tuple[ShardRecord, int]]] = deque()
    with ThreadPoolExecutor(_WRITERS) as pool:
        for number, run in enumerate(_group(batches, shard_tokens)):
            path = folder / "shards" / f"{split}-{number:05d}.arrow"
            waiting.append(pool.submit(_write_shard, path, folder, run))
            if len(waiting) > _WRITERS:  # shards that wait to be written hold memory
                written.append(waiting.popleft().result())
        written += [shard.result() for shard in waiting]
    return SplitRecord(
        documents=sum(shard.documents for shard, _ in written),
        tokens=sum(shard.tokens for shard, _ in written),
        text_bytes=sum(text_bytes for _, text_bytes in written),
        shards=tuple(shard for shard, _ in written),
    )


def _write_shard(path: Path, folder: Path, run: list[pa.RecordBatch]) -> tuple[ShardRecord, int]:
    """Writes a shard; its record, and the bytes of text in it."""
    batch = pa.concat_batches(run)
    write_batch(path, batch)
    return _describe(path, folder, batch), int(np.sum(batch.column("size_bytes").to_numpy(), dtype=np.int64))


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Writes one record batch as an Arrow IPC file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_batch(path: Path) -> pa.RecordBatch:
    """The one record batch of an Arrow IPC file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _group(batches: Iterable[pa.RecordBatch], shard_tokens: int) -> Iterator[list[pa.RecordBatch]]:
    """The documents of each shard."""
    pending: list[pa.RecordBatch] = []
    room = shard_tokens
    for batch in batches:
        offsets = batch.column("tokens").offsets.to_numpy()
        begin = 0
        while (last := int(np.searchsorted(offsets[1:], offsets[begin] + room))) < batch.num_rows:
            yield [*pending, batch.slice(begin, last + 1 - begin)]
            pending, begin, room = [], last + 1, shard_tokens
        if begin < batch.num_rows:
            pending.append(batch.slice(begin))
            room -= int(offsets[-1] - offsets[begin])
    if pending:
        yield pending


def _describe(path: Path, folder: Path, batch: pa.RecordBatch) -> ShardRecord:
    content = memoryview(pa.memory_map(str(path)).read_buffer())
    offsets = batch.column("tokens").offsets
    return ShardRecord(
        path=path.relative_to(folder).as_posix(),
        documents=batch.num_rows,
        tokens=offsets[-1].as_py() - offsets[0].as_py(),
        size_bytes=len(content),
        blocks=tuple(
            xxhash.xxh3_64_hexdigest(content[begin : begin + BLOCK_BYTES])
            for begin in range(0, len(content), BLOCK_BYTES)
        ),
    )
