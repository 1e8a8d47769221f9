"""Shards of a corpus in an object store, through a bounded folder on the local disk.

Processes of one machine share the folder. A copy is named by the digests of its blocks, so corpora that share shards
share copies, and a copy of something else is never taken. Copies fetched longest ago are removed first; a process that
still reads one keeps it until it lets go. Rows are visited in random order, so the folder should hold the whole split:
with less, shards are fetched again and again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

import blake3
import pyarrow as pa
import pyarrow.fs

from configs.errors import ArtifactError, ConfigError, StorageError
from pipelines.corpus.shards import INDEX, CorpusIndex, ShardRecord

T = TypeVar("T")
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5
_CHUNK_BYTES = 1 << 23


class ShardCache:
    """See `pipelines.corpus.reading.ShardFiles`; `max_bytes` bounds the copies in `folder`."""

    def __init__(self, remote: pa.fs.FileSystem, root: str, folder: Path, max_bytes: int) -> None:
        self.max_bytes: int | None = max_bytes
        self._remote = remote
        self._root = root.rstrip("/")
        self._folder = folder
        self._limit = max_bytes

    def __str__(self) -> str:
        return self._root

    @classmethod
    def open(cls, uri: str, folder: Path, max_bytes: int) -> Self:
        """The corpus artifact at `uri` (`s3://bucket/...`, `gs://...`, `file:///...`).

        Raises:
            ConfigError: `uri` is not one that pyarrow.fs knows.
        """
        try:
            remote, root = pa.fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, ValueError) as error:
            raise ConfigError(
                "not the address of an object store", received=uri, allowed="s3://, gs://, hdfs:// or file:// URIs"
            ) from error
        return cls(remote, root, folder, max_bytes)

    def index(self) -> CorpusIndex:
        """See `ShardFiles` and `CorpusIndex.parse`."""
        path = f"{self._root}/{INDEX}"
        try:
            content = self._persist(path, lambda: self._remote.open_input_stream(path).read())
        except FileNotFoundError:
            raise ArtifactError(
                f"{self._root} is not a corpus: it has no {INDEX}", next_step="give an artifact of the corpus stage"
            ) from None
        return CorpusIndex.parse(content, path)

    def fetch(self, record: ShardRecord) -> Path:
        """See `ShardFiles`: the copy, made if there is none.

        Raises:
            ConfigError: the shard alone is larger than the cache.
            StorageError: it cannot be fetched or written.
        """
        path = self._folder / f"{blake3.blake3(''.join(record.blocks).encode()).hexdigest()[:32]}.arrow"
        if not path.is_file():
            self._make_room(record.size_bytes)
            source = f"{self._root}/{record.path}"
            try:
                self._persist(source, lambda: self._copy(source, path))
            except FileNotFoundError as error:
                raise StorageError(f"{source} is gone", next_step="make the corpus again") from error
        return path

    def fetch_again(self, record: ShardRecord) -> Path:
        """See `ShardFiles`."""
        self.fetch(record).unlink(missing_ok=True)
        return self.fetch(record)

    def _persist(self, path: str, act: Callable[[], T]) -> T:
        """Acts up to `_ATTEMPTS` times, because object stores fail for moments."""
        attempts = 0
        while True:
            try:
                return act()
            except FileNotFoundError:
                raise
            except OSError as error:
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise StorageError(
                        f"cannot fetch {path} to {self._folder}", received=str(error),
                        next_step="mend the connection, the permissions or the local disk, then run again",
                    ) from error  # fmt: skip
                time.sleep(_PAUSE_SECONDS * attempts)

    def _copy(self, source: str, path: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with self._remote.open_input_stream(source) as remote, temporary.open("wb") as local:
                while chunk := remote.read(_CHUNK_BYTES):
                    local.write(chunk)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._limit:
            raise ConfigError(
                "the shard cache is smaller than a shard", received=f"{self._limit} bytes",
                allowed=f"at least {size_bytes}; best, room for the whole split",
            )  # fmt: skip
        copies = []
        for path in self._folder.glob("*.arrow"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process removed it meanwhile
                continue
            copies.append((status.st_mtime_ns, status.st_size, path))
        held = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if held + size_bytes <= self._limit:
                return
            path.unlink(missing_ok=True)
            held -= size
