"""Reading token shards: from a folder or an object store, every block compared with the index before it is used.

A block that does not match is read again; where shards are copies of a remote corpus, the shard is fetched again; then
reading stops with an error that names shard, offset and digest.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from configs.errors import CorruptArtifactError
from pipelines.corpus.packing import Pieces
from pipelines.corpus.shards import CorpusIndex, ShardRecord, SplitRecord, Tokens

Ints = npt.NDArray[np.int64]


class ShardFiles(Protocol):
    """Where the files of a corpus come from."""

    max_bytes: int | None
    """Bytes of shards that may be held at a time; None is no limit."""

    def index(self) -> CorpusIndex:
        """The corpus's index."""
        ...

    def fetch(self, record: ShardRecord) -> Path:
        """A local file that should hold the shard."""
        ...

    def fetch_again(self, record: ShardRecord) -> Path:
        """The same after what is kept of the shard locally was thrown away."""
        ...


class ShardFolder:
    """The files of a corpus that lies in a folder."""

    max_bytes: int | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def index(self) -> CorpusIndex:
        """See `ShardFiles` and `CorpusIndex.load`."""
        return CorpusIndex.load(self._folder)

    def fetch(self, record: ShardRecord) -> Path:
        """See `ShardFiles`."""
        return self._folder / record.path

    def fetch_again(self, record: ShardRecord) -> Path:
        """See `ShardFiles`; there is but the one copy."""
        return self._folder / record.path


class ShardReader:
    """A memory-mapped shard. Every block is compared with the index before its first byte is used."""

    def __init__(self, files: ShardFiles, record: ShardRecord, block_bytes: int) -> None:
        self._files = files
        self._record = record
        self._block_bytes = block_bytes
        self._verified = bytearray(len(record.blocks))
        self._unverified = len(record.blocks)
        self._path = Path()
        self._content: pa.Buffer = pa.py_buffer(b"")
        self._tokens: Tokens = np.empty(0, dtype=np.uint16)
        self._start = 0

    @classmethod
    def open(cls, files: ShardFiles, record: ShardRecord, block_bytes: int) -> Self:
        """Maps a shard and checks the blocks that describe its layout.

        Raises:
            CorruptArtifactError: the file is missing, has another size, or does not hold what the index says.
            StorageError: a remote shard cannot be fetched.
        """
        reader = cls(files, record, block_bytes)
        path = files.fetch(record)
        reader._map(path if _size(path) == record.size_bytes else files.fetch_again(record))
        reader._verify(0, 1)
        reader._verify(record.size_bytes - 1, record.size_bytes)
        values = reader._batch().column("tokens").flatten()
        if len(values) != record.tokens:
            raise _corrupt(reader._name(reader._path), 0, f"{len(values)} tokens", f"{record.tokens} tokens")
        reader._start = (
            values.buffers()[1].address - reader._content.address + values.offset * values.type.bit_width // 8
        )
        reader._tokens = values.to_numpy()
        return reader

    def read(self, begin: int, end: int) -> Tokens:
        """Tokens `begin` to `end` (exclusive) of the shard, without a copy.

        Raises:
            CorruptArtifactError: a block they lie in is not what was written.
        """
        if self._unverified:
            width = self._tokens.itemsize
            self._verify(self._start + begin * width, self._start + end * width)
        return self._tokens[begin:end]

    def offsets(self) -> Ints:
        """Where each document of the shard begins in its tokens, and the end. Raises as `read` does."""
        buffer = self._batch().column("tokens").buffers()[1]
        begin = buffer.address - self._content.address
        self._verify(begin, begin + buffer.size)
        offsets = self._batch().column("tokens").offsets.to_numpy()
        return offsets - offsets[0]

    def column(self, name: str) -> pa.Array:
        """What is said of each document beside its tokens; only its own blocks are checked. Raises as `read` does."""
        found = self._batch().column(name)
        for buffer in filter(None, found.buffers()):
            begin = buffer.address - self._content.address
            self._verify(begin, begin + buffer.size)
        return found

    def documents(self) -> pa.RecordBatch:
        """All columns, after every block was checked. Raises as `read` does."""
        self._verify(0, self._record.size_bytes)
        return self._batch()

    def _batch(self) -> pa.RecordBatch:
        return pa.ipc.open_file(pa.BufferReader(self._content)).get_batch(0)

    def _map(self, path: Path) -> None:
        size = _size(path)
        if size != self._record.size_bytes:
            raise _corrupt(self._name(path), 0, f"{size} bytes", f"{self._record.size_bytes} bytes")
        self._path = path
        self._content = pa.memory_map(str(path)).read_buffer()
        if len(self._tokens):
            self._tokens = self._view(len(self._tokens), self._tokens.itemsize)

    def _view(self, count: int, width: int) -> Tokens:
        if width == 2:
            return np.frombuffer(self._content, np.uint16, count, self._start)
        return np.frombuffer(self._content, np.uint32, count, self._start)

    def _verify(self, first_byte: int, end_byte: int) -> None:
        for number in range(first_byte // self._block_bytes, -(-end_byte // self._block_bytes)):
            if not self._verified[number]:
                if self._digest(number) != self._record.blocks[number]:
                    self._recover(number)
                self._verified[number] = True
                self._unverified -= 1

    def _recover(self, number: int) -> None:
        """Reads a damaged block again, then from a new copy of the shard, then gives up.

        A new copy is another file, so every block of it is checked anew.
        """
        for fetch in (self._files.fetch, self._files.fetch_again):
            self._map(fetch(self._record))
            if self._digest(number) == self._record.blocks[number]:
                self._verified = bytearray(len(self._record.blocks))
                self._unverified = len(self._record.blocks)
                return
        received, allowed = self._digest(number), self._record.blocks[number]
        raise _corrupt(self._name(self._path), number * self._block_bytes, f"xxh3 {received}", f"xxh3 {allowed}")

    def _name(self, path: Path) -> str:
        return str(path) if path.match(self._record.path) else f"{self._record.path} (copy {path})"

    def _digest(self, number: int) -> str:
        begin = number * self._block_bytes
        return xxhash.xxh3_64_hexdigest(memoryview(self._content)[begin : begin + self._block_bytes])


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _corrupt(shard: str, offset: int, received: str, allowed: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"shard {shard} is damaged at byte {offset}", received=received, allowed=allowed,
        next_step="ganymede artifacts verify; remove the corpus and run the recipe again to make it anew",
    )  # fmt: skip


class TokenStream:
    """The tokens of a split, one document after the other over all its shards.

    Shards are opened when they are first read; at most `files.max_bytes` of them are kept open.
    """

    def __init__(self, files: ShardFiles, record: SplitRecord, block_bytes: int) -> None:
        self.record = record
        self._files = files
        self._block_bytes = block_bytes
        self._bounds = [0, *itertools.accumulate(s.tokens for s in record.shards)]
        """Where each shard begins in the stream, and the end."""
        self._readers: dict[int, ShardReader] = {}

    def reader(self, shard: int) -> ShardReader:
        """The reader of shard number `shard`."""
        reader = self._readers.get(shard)
        if reader is None:
            self._make_room(self.record.shards[shard].size_bytes)
            reader = ShardReader.open(self._files, self.record.shards[shard], self._block_bytes)
            self._readers[shard] = reader
        return reader

    def _make_room(self, size_bytes: int) -> None:
        """Lets go of the shards opened longest ago, as the cache on disk does."""
        if self._files.max_bytes is None:
            return
        held = sum(self.record.shards[shard].size_bytes for shard in self._readers)
        while self._readers and held + size_bytes > self._files.max_bytes:
            oldest = next(iter(self._readers))
            del self._readers[oldest]
            held -= self.record.shards[oldest].size_bytes

    def gather(self, pieces: Pieces, out: Ints) -> None:
        """Copies `pieces` to their places in the flattened `out`. Raises as `ShardReader.read` does.

        A copy of one piece costs 1 to 2 us plus what its tokens take, less than indexing an open `np.memmap`.
        """
        bounds, readers = self._bounds, self._readers
        for place, begin, length in zip(
            pieces.places.tolist(), pieces.begins.tolist(), pieces.lengths.tolist(), strict=True
        ):
            end = begin + length
            while begin < end:  # more than once where the piece lies in several shards
                shard = bisect_right(bounds, begin) - 1
                start, stop = bounds[shard], bounds[shard + 1]
                if stop > end:
                    stop = end
                reader = readers.get(shard) or self.reader(shard)
                out[place : place + stop - begin] = reader.read(begin - start, stop - start)
                place += stop - begin
                begin = stop

    def offsets(self) -> Ints:
        """Where each document begins in the stream, and the end; reads a few bytes a document."""
        parts = [self.reader(shard).offsets()[:-1] + start for shard, start in enumerate(self._bounds[:-1])]
        return np.concatenate([*parts, self._bounds[-1:]])
