"""Corpora in the file format of Megatron-LM.

`<prefix>.bin` is the token stream; `<prefix>.idx` says where each document lies in it, as Megatron-Core's
`IndexedDataset` reads it (megatron/core/datasets/indexed_dataset.py): the magic, version 1, a code for the type of the
tokens, the numbers of sequences and of document bounds, then int32 lengths and int64 byte offsets of the sequences and
int64 document bounds. One document is one sequence here and ends with the end-of-text token. All little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from configs.errors import DataError, InputError, StorageError
from pipelines.corpus.reading import ShardFolder, TokenStream
from pipelines.corpus.shards import CorpusIndex

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_TYPE_CODES = {"uint16": 8, "uint32": 4}
"""Megatron has no unsigned 32-bit type; ids below 2**31 have the same bytes in its int32."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    tokens: Path
    index: Path
    documents: int
    token_count: int


def export_megatron(corpus: Path, split: str, prefix: Path) -> Exported:
    """Writes `split` of a corpus as `<prefix>.bin` and `<prefix>.idx`; the index is written last.

    Every block is verified on the way; memory is that of the documents' offsets and one shard.

    Raises:
        CorruptArtifactError: a shard is damaged.
        DataError: there is no such split.
        InputError: one of the files is there already.
        StorageError: the files cannot be written.
    """
    index = CorpusIndex.load(corpus)
    record = index.splits.get(split)
    if record is None:
        raise DataError(f"{corpus} has no such split", received=split, allowed=", ".join(index.splits))
    written = Exported(_path(prefix, ".bin"), _path(prefix, ".idx"), record.documents, record.tokens)
    for path in (written.tokens, written.index):
        if path.exists():
            raise InputError(f"{path} is there already", next_step="choose another prefix, or remove the file")
    stream = TokenStream(ShardFolder(corpus), record, index.block_bytes)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        _write(written.tokens, lambda file: _write_tokens(file, stream))
        _write(written.index, lambda file: _write_index(file, stream, index.dtype))
    except OSError as error:
        raise StorageError(
            f"cannot write {prefix}.bin and .idx: {error.strerror or error}",
            next_step="free disk space or mend the permissions, then run the same command",
        ) from error
    return written


def _path(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _write(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            fill(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_tokens(file: BinaryIO, stream: TokenStream) -> None:
    for number, shard in enumerate(stream.record.shards):
        file.write(stream.reader(number).read(0, shard.tokens).data)


def _write_index(file: BinaryIO, stream: TokenStream, dtype: str) -> None:
    offsets = stream.offsets()
    documents = len(offsets) - 1
    file.write(_MAGIC + struct.pack("<QBQQ", _VERSION, _TYPE_CODES[dtype], documents, documents + 1))
    file.write(np.diff(offsets).astype("<i4").data)
    file.write((offsets[:-1] * np.dtype(dtype).itemsize).astype("<i8").data)
    file.write(np.arange(documents + 1, dtype="<i8").data)
