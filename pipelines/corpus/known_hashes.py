"""What the files of sources were hashed to, so that files that did not change are not read again.

A hash is used only while the file bears the stamp it had when it was hashed: size, time of change, inode and the
inode's own time of change on a local disk, which no program can set back; size and entity tag in an object store. The
stamp decides nothing else: a source is known by the names and the content of its files.

Inside `kept_in(folder)` hashes outlive the process, in one file a source below `folder`. A file that is damaged is
thrown away with a warning in the log, and its source hashed anew.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import blake3

from actors.store.artifacts import write_durably

_log = logging.getLogger("ganymede.corpus")

_SETTLED_NS = 2_000_000_000
"""Files changed less than this before they were hashed are hashed again: a later change may bear the same time."""
_SAVE_SECONDS = 30.0
"""A run that is killed while it hashes loses no more than this."""


class Stamp(NamedTuple):
    """What changes whenever the content of a file does."""

    size_bytes: int
    changed_ns: int
    """The later of the times of change; 0 where the tag alone says it."""
    tag: str


def take_stamp(filesystem: Any, path: str) -> Stamp | None:
    """The stamp of a file; None if its file system keeps nothing that could be trusted.

    Raises:
        OSError: the file is not there or cannot be opened.
    """
    if filesystem.type_name == "local":
        found = os.stat(path)  # noqa: PTH116 pyarrow's paths are strings, and there may be millions
        times = max(found.st_mtime_ns, found.st_ctime_ns)
        return Stamp(found.st_size, times, f"{found.st_ino}:{found.st_mtime_ns}:{found.st_ctime_ns}")
    with filesystem.open_input_file(path) as opened:
        described = {key.lower(): value for key, value in (opened.metadata() or {}).items()}
        tag = described.get("etag") or described.get(b"etag")
        return None if not tag else Stamp(opened.size(), 0, tag.decode() if isinstance(tag, bytes) else str(tag))


class SourceHashes:
    """The hashes of the files below one root."""

    def __init__(self, path: Path | None, known: dict[str, tuple[Stamp, str]]) -> None:
        self._path = path
        self._known = known
        self._changed = False
        self._saved = time.monotonic()

    @classmethod
    def load(cls, path: Path | None) -> SourceHashes:
        """Those kept at `path`; none if that is None, missing or damaged."""
        if path is None or not path.is_file():
            return cls(path, {})
        try:
            digest, _, content = path.read_bytes().partition(b"\n")
            if digest.decode() != blake3.blake3(content).hexdigest():
                raise ValueError("its checksum does not hold")
            return cls(path, {n: (Stamp(*stamp), blake) for n, (*stamp, blake) in json.loads(content).items()})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("hashes kept at %s cannot be used (%s): the source is hashed anew", path, error)
            return cls(path, {})

    def find(self, name: str, stamp: Stamp) -> str | None:
        """The blake3 of a file that bears `stamp`; None if it is not known."""
        found = self._known.get(name)
        return found[1] if found is not None and found[0] == stamp else None

    def add(self, name: str, stamp: Stamp, digest: str, *, began_ns: int) -> None:
        """Keeps the hash of a file that bore `stamp` before and after it was read; `began_ns` is when that began."""
        if stamp.changed_ns + _SETTLED_NS < began_ns:
            self._known[name] = (stamp, digest)
            self._changed = True

    def save(self, *, now: bool) -> None:
        """Writes what is known, if there is a place for it and it is new; unless `now`, only every few seconds."""
        if self._path is None or not self._changed or not (now or time.monotonic() > self._saved + _SAVE_SECONDS):
            return
        content = json.dumps({n: [*stamp, digest] for n, (stamp, digest) in sorted(self._known.items())}).encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._path, blake3.blake3(content).hexdigest().encode() + b"\n" + content)
        except OSError as error:
            _log.warning("hashes cannot be kept at %s (%s): the next run reads the source again", self._path, error)
        self._changed, self._saved = False, time.monotonic()


_folder: Path | None = None
_loaded: dict[str, SourceHashes] = {}
"""By the name of their file."""


def hashes_of(place: str) -> SourceHashes:
    """The hashes of the source at `place`, as far as they are known."""
    key = blake3.blake3(place.encode()).hexdigest(length=16)
    if key not in _loaded:
        _loaded[key] = SourceHashes.load(None if _folder is None else _folder / f"{key}.json")
    return _loaded[key]


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Until the end of the block, this process keeps hashes below `folder` and uses those that are there."""
    global _folder
    before, _folder = _folder, folder
    _loaded.clear()
    try:
        yield
    finally:
        _folder = before
        _loaded.clear()
