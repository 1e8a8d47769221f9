"""Bytes of a source file after decompression, and the whole lines among them.

A line belongs to the range in which its first byte lies, so ranges that cover a file yield every line once. A stream
that breaks off (truncated gzip, a failing disk) says so; the line it broke off in is lost with the rest, no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.corpus.sources import Rejected, check_reached

CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 64 << 20
"""Longest line or document; what is longer goes to quarantine, because a worker holds a whole record in memory."""

_COMPRESSED_READ_BYTES = 1 << 16
"""Bytes asked of a decompressor at a time; when it fails, what it had of these is lost."""


class Stream:
    """A file's bytes. After the end, `failure` says why it is not the real end, if it is not."""

    def __init__(self, opened: Any, compression: str | None) -> None:
        self._opened = opened if compression is None else pa.CompressedInputStream(opened, compression)
        self._step = CHUNK_BYTES if compression is None else _COMPRESSED_READ_BYTES
        self.failure: str | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        parts: list[bytes] = []
        missing = size
        while missing > 0 and self.failure is None:
            try:
                part: bytes = self._opened.read(min(missing, self._step))
            except OSError as error:
                check_reached(error, "the file")
                self.failure = str(error).splitlines()[0]
                break
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def seek(self, position: int) -> None:
        """Goes to a byte of a file that is not compressed."""
        self._opened.seek(position)

    def lost(self, name: str, offset: int) -> Rejected:
        """What is to be said of a stream that failed; `offset` is the first byte without a record."""
        return Rejected(name, offset, f"{self.failure}; the rest of the file is lost", rest=True)


def read_lines(stream: Stream, name: str, begin: int, end: int | None) -> Iterator[tuple[int, bytes] | Rejected]:
    """The lines that begin in [begin, end), many at a time: the offset of the first, and their bytes.

    Lines end with a line feed, which all but the last line of a file have.
    """
    offset, skipping = begin, begin > 0
    if skipping:
        offset -= 1
        stream.seek(offset)
    pending: list[bytes] = []  # the beginning of a line, from `offset` on
    held = 0
    while chunk := stream.read(CHUNK_BYTES):
        cut = chunk.find(b"\n") + 1
        if skipping or held + (cut - 1 if cut else len(chunk)) > MAX_RECORD_BYTES:
            if not skipping:
                yield Rejected(name, offset, f"a line of more than {MAX_RECORD_BYTES} bytes")
            offset += held + (cut or len(chunk))
            pending, held, skipping = [], 0, not cut
            if end is not None and offset >= end:  # no line begins in the range, however long this one goes on
                return
            if skipping:
                continue
            chunk = chunk[cut:]
            cut = chunk.find(b"\n") + 1
        if not cut:
            pending.append(chunk)
            held += len(chunk)
            continue
        buffer = b"".join([*pending, chunk])
        last = None if end is None else end - 1 - offset
        if last is not None and last < len(buffer) and (cut := buffer.find(b"\n", last) + 1):
            yield offset, buffer[:cut]
            return
        cut = buffer.rfind(b"\n") + 1
        yield offset, buffer[:cut]
        offset += cut
        pending, held = [buffer[cut:]], len(buffer) - cut
    if stream.failure is not None:
        yield stream.lost(name, offset)
    elif held:
        yield offset, b"".join(pending)
