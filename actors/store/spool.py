"""Tracking records on disk: what a run logged, waiting to be delivered.

A spool is a folder with one folder a run. A process that logs to a run appends JSON lines to a *segment*, a file of its
own, and holds a lock on it for as long as it lives; so a segment whose lock is free is complete, and may be deleted
once it is delivered. How far delivery got is kept beside the segments, in `delivery.json`.

Guarantee: an append that returned survives `kill -9` of the process. It is not synced to the platter: a power cut may
take the last seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from configs.errors import StorageError

_STATE = "delivery.json"
_REJECTED = "rejected.jsonl"
_NOT_IN_A_FILE_NAME = re.compile(r"[^A-Za-z0-9._@-]+")


def run_folder(spool: Path, key: str) -> Path:
    """The folder of the run called `key`: a readable name, kept apart from others by a hash."""
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    return spool / f"{_NOT_IN_A_FILE_NAME.sub('_', key)[:80]}-{digest}"


class Recorder:
    """Appends records to a segment of its own. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._segment: tuple[int, Path] | None = None
        self._files = 0

    def append(self, op: str, **fields: Any) -> None:
        """Writes one record, with the time. Raises `StorageError` if the disk refuses; nothing is half written."""
        line = json.dumps({"op": op, "time_ms": int(time.time() * 1000), **fields}).encode() + b"\n"
        with self._lock, _storage(self.folder):
            descriptor, _ = self._open()
            size = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, line)
                if written < len(line):
                    os.write(descriptor, line[written:])
            except OSError:
                os.ftruncate(descriptor, size)
                raise

    def file(self, name: str) -> Path:
        """A new path called `name` beside the segment, for a file that a record speaks of."""
        with self._lock, _storage(self.folder):
            _, segment = self._open()
            self._files += 1
            path = _files_of(segment) / f"{self._files:06d}" / name
            path.parent.mkdir(parents=True)
            return path

    def keep(self, source: Path) -> Path:
        """Copies a file beside the segment, so that it is sent as it is now."""
        with _storage(self.folder):
            return Path(shutil.copyfile(source, self.file(source.name)))

    def close(self) -> None:
        """Gives the segment up; a later append begins another."""
        with self._lock:
            if self._segment is not None:
                os.close(self._segment[0])
                self._segment = None

    def _open(self) -> tuple[int, Path]:
        while self._segment is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{time.time_ns():020d}-{os.getpid()}.jsonl"
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_RDWR, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                self._segment = (descriptor, path)
            else:  # retired as empty between its creation and the lock
                os.close(descriptor)
        return self._segment


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot keep tracking records in {folder}: {error}", next_step="free space or fix permissions, run again"
        ) from error


@dataclass
class DeliveryState:
    """How far the delivery of one run got."""

    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    """Bytes delivered, by segment."""
    last_steps: dict[str, int] = field(default_factory=dict)
    """The last step sent, by metric."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The state kept in `folder`, or a fresh one."""
        try:
            return cls(**json.loads((folder / _STATE).read_bytes()))
        except FileNotFoundError:
            return cls()

    def save(self, folder: Path) -> None:
        """Replaces the state kept in `folder`."""
        temporary = folder / f".{_STATE}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(folder / _STATE)


@dataclass(frozen=True)
class Entry:
    """A record, and the offset in its segment at which the next one begins."""

    end: int
    record: dict[str, Any]


def segments(folder: Path) -> list[Path]:
    """The segments of a run, oldest first."""
    return sorted(p for p in folder.glob("*.jsonl") if p.name != _REJECTED)


def entries(segment: Path, start: int, limit: int) -> list[Entry]:
    """Up to `limit` whole records from the byte offset `start`; a line without its end is left alone."""
    found: list[Entry] = []
    with segment.open("rb") as file:
        file.seek(start)
        while len(found) < limit and (line := file.readline()).endswith(b"\n"):
            found.append(Entry(file.tell(), _parse(line)))
    return found


def _parse(line: bytes) -> dict[str, Any]:
    """The record of a line; a line that a power cut spoiled becomes a record that delivery sets aside."""
    try:
        record = json.loads(line)
    except ValueError:
        return {"op": "unreadable", "line": repr(line)}
    return dict(record)


def retire(segment: Path, state: DeliveryState) -> None:
    """Deletes a delivered segment and its files if its writer is gone. What a killed writer tore goes with it."""
    with segment.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if entries(segment, state.offsets.get(segment.name, 0), 1):
            return
        shutil.rmtree(_files_of(segment), ignore_errors=True)
        segment.unlink()
    if state.offsets.pop(segment.name, None) is not None:
        state.save(segment.parent)


def reject(folder: Path, record: dict[str, Any], error: str) -> None:
    """Keeps a record that the server refuses for good, with its reason."""
    with (folder / _REJECTED).open("a") as file:
        file.write(json.dumps({"error": error, **record}) + "\n")


def unsent(spool: Path) -> int:
    """Points below `spool` that are not delivered: metric values, and other records one each."""
    total = 0
    for folder in run_folders(spool):
        state = DeliveryState.load(folder)
        for segment in segments(folder):
            for entry in entries(segment, state.offsets.get(segment.name, 0), 1 << 60):
                total += len(entry.record.get("metrics", ())) or 1
    return total


def run_folders(spool: Path) -> list[Path]:
    """The folders of all runs of a spool."""
    return sorted(p for p in spool.iterdir() if p.is_dir()) if spool.is_dir() else []


@contextmanager
def sole_delivery(spool: Path) -> Iterator[bool]:
    """Held by the one process that delivers from `spool`; gives False at once if another holds it."""
    spool.mkdir(parents=True, exist_ok=True)
    with (spool / "delivery.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _files_of(segment: Path) -> Path:
    return segment.with_suffix(".files")
