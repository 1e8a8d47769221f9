"""Readers of text: a file, a line, a paragraph, a JSON object or a row of CSV or TSV is a document.

Every reader accounts for all it reads: what is no document comes back as `Rejected`, with where it is and why. White
space between records is none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence

import orjson

from configs.schema.corpus import SourceConfig
from pipelines.corpus.blocks import Block, Read, gather
from pipelines.corpus.sources import Rejected
from pipelines.corpus.streams import CHUNK_BYTES, MAX_RECORD_BYTES, Stream, read_lines

Reader = Callable[[Stream, str, int, int | None, SourceConfig], Read]

_BOM = b"\xef\xbb\xbf"
_MAX_HEADER_BYTES = 1 << 20


def _decode(content: bytes, name: str, offset: int) -> str | Rejected:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return Rejected(name, offset + error.start, f"not UTF-8: {error.reason}")


def read_text(stream: Stream, name: str, begin: int, end: int | None, config: SourceConfig) -> Read:
    """The file as one document, byte for byte."""
    content = stream.read(MAX_RECORD_BYTES + 1)  # and no more, however large the file is
    if stream.failure is not None:
        yield stream.lost(name, len(content))
        return
    if len(content) > MAX_RECORD_BYTES:
        reason = f"a document of more than {MAX_RECORD_BYTES} bytes; set source.format to lines or paragraphs"
        yield Rejected(name, 0, reason, rest=True)
        return
    text = _decode(content, name, 0)
    yield text if isinstance(text, Rejected) else Block([0], [text])


def read_each_line(stream: Stream, name: str, begin: int, end: int | None, config: SourceConfig) -> Read:
    """Every line with something visible in it is a document, without its line end."""
    for found in read_lines(stream, name, begin, end):
        if isinstance(found, Rejected):
            yield found
            continue
        block = Block()
        for offset, line in _split(*found):
            text = _decode(line.removesuffix(b"\r"), name, offset)
            if isinstance(text, Rejected):
                yield text
            else:
                block.positions.append(offset)
                block.texts.append(text)
        yield block


def _split(offset: int, lines: bytes) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its offset; a byte-order mark at the file's start left out."""
    for line in lines.split(b"\n"):
        if line and not line.isspace():
            yield offset, line.removeprefix(_BOM) if offset == 0 else line
        offset += len(line) + 1


def read_paragraphs(stream: Stream, name: str, begin: int, end: int | None, config: SourceConfig) -> Read:
    """Lines up to a blank one are a document; it belongs to the range in which its first byte lies."""
    start = _last_visible(stream, begin)
    skipping = start is not None  # what is left of a paragraph that began before
    pending: list[bytes] = []
    first = size = 0
    last = None if end is None else end + MAX_RECORD_BYTES  # where the longest paragraph that begins before `end` ends
    for found in read_lines(stream, name, 0 if start is None else start + 1, last):
        block = Block()
        if isinstance(found, Rejected):
            if found.rest or pending or not (skipping or _past(found.offset, end)):
                yield found
            pending, skipping = [], True
            continue
        offset, lines = found
        if skipping and _past(offset, end):
            return
        for line in lines.removesuffix(b"\n").split(b"\n"):
            if not line.strip():
                skipping = False
                yield from _paragraph(block, name, first, pending)
                pending, size = [], 0
            elif not skipping:
                if not pending:
                    if _past(offset, end):
                        yield block
                        return
                    first = offset
                pending.append(line)
                size += len(line) + 1
                if size > MAX_RECORD_BYTES:
                    yield Rejected(name, first, f"a paragraph of more than {MAX_RECORD_BYTES} bytes")
                    pending, size, skipping = [], 0, True
            offset += len(line) + 1
        yield block
    if stream.failure is None:
        block = Block()
        yield from _paragraph(block, name, first, pending)
        yield block


def _past(offset: int, end: int | None) -> bool:
    return end is not None and offset >= end


def _paragraph(block: Block, name: str, first: int, lines: list[bytes]) -> Iterator[Rejected]:
    """Adds a finished paragraph, if there is one, to `block`."""
    if not lines:
        return
    content = b"\n".join(lines).removesuffix(b"\r")
    text = _decode(content.removeprefix(_BOM) if first == 0 else content, name, first)
    if isinstance(text, Rejected):
        yield text
    else:
        block.positions.append(first)
        block.texts.append(text)


def _last_visible(stream: Stream, begin: int) -> int | None:
    """The last byte before `begin` that is not white space; None if there is none, and then the stream is at its
    beginning."""
    end = begin
    while end > 0:
        start = max(0, end - 4096)
        stream.seek(start)
        kept = stream.read(end - start).rstrip()
        if kept:
            return start + len(kept) - 1
        end = start
    if begin > 0:
        stream.seek(0)
    return None


def read_jsonl(stream: Stream, name: str, begin: int, end: int | None, config: SourceConfig) -> Read:
    """Every line is a JSON object."""
    for found in read_lines(stream, name, begin, end):
        if isinstance(found, Rejected):
            yield found
            continue
        records: list[tuple[int, object]] = []
        for offset, line in _split(*found):
            try:
                records.append((offset, orjson.loads(line)))
            except orjson.JSONDecodeError as error:
                records.append((offset, ValueError(f"not JSON: {error}")))
        yield from gather(name, records, config.fields)


def read_tsv(stream: Stream, name: str, begin: int, end: int | None, config: SourceConfig) -> Read:
    """Every line is a row; tabs separate its fields and nothing is quoted."""
    header: Sequence[str] | None = config.columns or None
    if header is None and begin > 0:
        stream.seek(0)
        line = next((line for _, line in _split(0, stream.read(_MAX_HEADER_BYTES))), b"")
        header = line.decode("utf-8", "replace").removesuffix("\r").split("\t")
    for found in read_lines(stream, name, begin, end):
        if isinstance(found, Rejected):
            yield found
            continue
        records: list[tuple[int, object]] = []
        for offset, line in _split(*found):
            text = _decode(line.removesuffix(b"\r"), name, offset)
            if isinstance(text, Rejected):
                yield text
            elif header is None:
                header = text.split("\t")
            else:
                records.append((offset, _row(header, text.split("\t"))))
        yield from gather(name, records, config.fields)


def _row(header: Sequence[str], values: list[str]) -> dict[str, str] | ValueError:
    """A row as a mapping, or what is wrong with it."""
    if len(values) != len(header):
        return ValueError(f"{len(values)} fields, not {len(header)}")
    return dict(zip(header, values, strict=True))


def read_csv(stream: Stream, name: str, begin: int, end: int | None, config: SourceConfig) -> Read:
    """Every row is a document; fields may be quoted (RFC 4180), and a quoted field may hold line ends."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    source = _CsvLines(stream, name)
    rows = csv.reader(source, strict=True)
    header: Sequence[str] | None = config.columns or None
    records: list[tuple[int, object]] = []
    size = 0
    while True:
        first = source.offset
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            records.append((first, ValueError(f"not CSV: {error}")))
        else:
            if row and header is None:
                header = row
            elif row and header is not None:
                records.append((first, _row(header, row)))
        size += source.offset - first
        if size > CHUNK_BYTES:
            yield from gather(name, records, config.fields)
            records, size = [], 0
    yield from gather(name, records, config.fields)
    yield from source.rejected


class _CsvLines:
    """Lines for `csv.reader`. Bytes that are not UTF-8 become lone surrogates, which no document may hold."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._lines = self._read(stream, name)
        self.offset = 0
        """Where the next line begins."""
        self.rejected: list[Rejected] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._lines)

    def _read(self, stream: Stream, name: str) -> Iterator[str]:
        for found in read_lines(stream, name, 0, None):
            if isinstance(found, Rejected):
                self.rejected.append(found)
                continue
            self.offset, lines = found
            for line in io.BytesIO(lines):
                content = line.removeprefix(_BOM) if self.offset == 0 else line
                self.offset += len(line)
                yield content.decode("utf-8", "surrogateescape")


LINE_READERS: dict[str, Reader] = {
    "text": read_text,
    "lines": read_each_line,
    "paragraphs": read_paragraphs,
    "jsonl": read_jsonl,
    "tsv": read_tsv,
    "csv": read_csv,
}
