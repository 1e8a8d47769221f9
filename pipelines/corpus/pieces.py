"""Pieces of files, and the plan that makes spans of them.

A piece is what one reader reads in one go: a file, a byte range of a file of lines, or some row groups of a Parquet
file. A span is a run of pieces, in the order of the files' names. Both follow from the listing alone, never from the
cluster, and the documents come in the same order whatever the size of the spans is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from configs.schema.corpus import SourceConfig
from pipelines.corpus.sources import Listing, SourceFile
from pipelines.corpus.tables import row_group_sizes

Format = Literal["text", "lines", "paragraphs", "jsonl", "csv", "tsv", "parquet", "arrow"]
Compression = Literal["gzip", "zstd"]

SMALLEST_SPAN_BYTES = 1 << 20
LARGEST_SPAN_BYTES = 64 << 20
"""A worker with 62 MB of documents of 200 bytes and all their fingerprints took 707 MB; longer ones take less."""
_SPAN_SHARE_BYTES = 1 << 16
"""Spans grow with the root of the source: 40 spans of 2.6 MB at 100 MB, 130 of 8 MB at 1 GB, 15,000 at 1 TB. Fewer
would leave workers idle at the end, more would cost: a span of 1.3 MB takes 37 ms, 7 of them to make it durable."""

_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_BY_BYTES = ("lines", "paragraphs", "jsonl", "tsv")
"""Formats that a range of bytes can be read from; CSV is not one, because a quoted field may hold line ends."""


@dataclass(frozen=True)
class Piece:
    """Part of a file. `begin` and `end` are bytes, or row groups of Parquet; None is the end."""

    file: SourceFile
    begin: int
    end: int | None
    size_bytes: int
    """Bytes of the stored file that the piece stands for."""


def file_format(name: str, config: SourceConfig) -> tuple[Format, Compression | None]:
    """How the file `name` is read."""
    compression = next((kind for ending, kind in _COMPRESSIONS.items() if name.endswith(ending)), None)
    if config.format != "auto":
        return config.format, compression
    inner = name.rpartition(".")[0] if compression else name
    return next((kind for ending, kind in _FORMATS.items() if inner.endswith(ending)), "text"), compression


def choose_span_bytes(size_bytes: int) -> int:
    """How much of a source of `size_bytes` one task takes."""
    return min(max(isqrt(size_bytes * _SPAN_SHARE_BYTES), SMALLEST_SPAN_BYTES), LARGEST_SPAN_BYTES)


def plan_spans(listing: Listing, config: SourceConfig, span_bytes: int) -> list[tuple[Piece, ...]]:
    """Cuts a listing into runs of pieces that end with the piece that reaches `span_bytes`."""
    spans: list[tuple[Piece, ...]] = []
    pending: list[Piece] = []
    size = 0
    for file in listing.files:
        for piece in _cut(listing, file, config, span_bytes):
            pending.append(piece)
            size += piece.size_bytes
            if size >= span_bytes:
                spans.append(tuple(pending))
                pending, size = [], 0
    return [*spans, tuple(pending)] if pending else spans


def _cut(listing: Listing, file: SourceFile, config: SourceConfig, piece_bytes: int) -> Iterator[Piece]:
    kind, compression = file_format(file.name, config)
    if file.size_bytes > piece_bytes and compression is None:
        if kind in _BY_BYTES:
            for begin in range(0, file.size_bytes, piece_bytes):
                end = min(begin + piece_bytes, file.size_bytes)
                yield Piece(file, begin, end, end - begin)
            return
        if kind == "parquet":
            with listing.open(file) as opened:
                sizes = row_group_sizes(opened)
            if len(sizes) > 1:
                yield from _runs(file, sizes, piece_bytes)
                return
    yield Piece(file, 0, None, file.size_bytes)


def _runs(file: SourceFile, sizes: Sequence[int], piece_bytes: int) -> Iterator[Piece]:
    """Runs of row groups, given how much of the file each stands for."""
    share = file.size_bytes / max(sum(sizes), 1)
    begin, size = 0, 0.0
    for number, part in enumerate(sizes, 1):
        size += part * share
        if size >= piece_bytes or number == len(sizes):
            yield Piece(file, begin, number, round(size))
            begin, size = number, 0.0
