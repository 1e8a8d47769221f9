"""Training rows as an index over the token stream of a split; no token is copied.

A row has `row_tokens` inputs and the token that follows the last, so it holds `row_tokens + 1` tokens. Three layouts:

- `chunk`: the stream cut every `row_tokens`. No padding; most documents longer than a few tokens are cut somewhere.
- `best-fit`: a document that fits in a row is never cut; longer ones are cut into full rows and a rest, and rests and
  documents are packed by best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", 2024).
- `document`: one document a row, for fine-tuning; what does not fit is dropped, and counted.

The pieces of a cut document overlap by one token, so that every token but a document's first is predicted once.
A layout is a pure function of the documents' lengths and `row_tokens`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pipelines.corpus.shards import read_batch, write_batch

Ints = npt.NDArray[np.int64]
Layout = Literal["chunk", "best-fit", "document"]
_CHECKSUM = b"xxh3-128"


@dataclass(frozen=True)
class Pieces:
    """Runs of the token stream that make up some rows, in the order of rows and columns; arrays of one length."""

    rows: Ints
    """Which of the rows that were asked for, from 0."""
    columns: Ints
    """Where in the row the run begins."""
    begins: Ints
    """Where in the token stream the run begins."""
    lengths: Ints


@dataclass(frozen=True)
class PackingReport:
    """What a layout does to the documents of a split. Counts are of tokens unless the name says otherwise."""

    rows: int
    places: int
    """Room for tokens: `rows * (row_tokens + 1)`."""
    padding: int
    """Places that hold no token."""
    dropped: int
    """Tokens that no row holds."""
    documents: int
    cut_documents: int
    """Documents that no row holds whole."""

    @property
    def utilisation(self) -> float:
        """Share of the places that hold a token."""
        return 1 - self.padding / self.places

    @property
    def truncation(self) -> float:
        """Share of the documents that no row holds whole."""
        return self.cut_documents / self.documents


class Packing(Protocol):
    """Rows of up to `row_tokens + 1` tokens over a token stream."""

    row_tokens: int
    rows: int

    def pieces(self, rows: Ints) -> Pieces:
        """The pieces of `rows` (numbers from 0 to `self.rows - 1`)."""
        ...

    def report(self, offsets: Ints) -> PackingReport:
        """What this layout does to the documents that lie between `offsets` of the stream."""
        ...


class ChunkPacking:
    """Layout `chunk`; arithmetic alone, so it costs nothing to open at any size."""

    def __init__(self, tokens: int, row_tokens: int) -> None:
        self.row_tokens = row_tokens
        self.rows = (tokens - 1) // row_tokens

    def pieces(self, rows: Ints) -> Pieces:
        """See `Packing`; one piece a row."""
        count = len(rows)
        lengths = np.full(count, self.row_tokens + 1, dtype=np.int64)
        return Pieces(np.arange(count), np.zeros(count, dtype=np.int64), rows * self.row_tokens, lengths)

    def report(self, offsets: Ints) -> PackingReport:
        """See `Packing`."""
        begins, ends = offsets[:-1], offsets[1:]
        row = np.minimum(begins // self.row_tokens, self.rows - 1)
        cut = ends > row * self.row_tokens + self.row_tokens + 1
        dropped = int(offsets[-1]) - (self.rows * self.row_tokens + 1)
        places = self.rows * (self.row_tokens + 1)
        return PackingReport(self.rows, places, 0, dropped, len(begins), int(cut.sum()))


class IndexPacking:
    """Layouts `best-fit` and `document`: a table of pieces, row by row.

    The table can be written once and memory-mapped from then on.
    """

    def __init__(self, row_tokens: int, begins: Ints, lengths: Ints, row_offsets: Ints) -> None:
        self.row_tokens = row_tokens
        self.rows = len(row_offsets) - 1
        self._begins = begins
        self._lengths = lengths
        self._row_offsets = row_offsets

    def pieces(self, rows: Ints) -> Pieces:
        """See `Packing`."""
        firsts = self._row_offsets[rows]
        counts = self._row_offsets[rows + 1] - firsts
        chosen = np.repeat(firsts, counts) + _ramps(counts)
        lengths = self._lengths[chosen]
        before = np.cumsum(lengths) - lengths
        columns = before - np.repeat(before[np.cumsum(counts) - counts], counts)
        return Pieces(np.repeat(np.arange(len(rows)), counts), columns, self._begins[chosen], lengths)

    def report(self, offsets: Ints) -> PackingReport:
        """See `Packing`."""
        places = self.rows * (self.row_tokens + 1)
        order = np.argsort(self._begins, kind="stable")
        begins, ends = self._begins[order], (self._begins + self._lengths)[order]
        overlap = int(np.maximum(ends[:-1] - begins[1:], 0).sum())
        held = int(self._lengths.sum())
        cut = int((np.diff(offsets) > self.row_tokens + 1).sum())
        dropped = int(offsets[-1] - offsets[0]) - (held - overlap)
        return PackingReport(self.rows, places, places - held, dropped, len(offsets) - 1, cut)

    def write(self, path: Path) -> None:
        """Writes the table as an Arrow IPC file: a list of (begin, length) a row, and a checksum."""
        values = pa.StructArray.from_arrays([pa.array(self._begins), pa.array(self._lengths)], ["begin", "length"])
        rows = pa.LargeListArray.from_arrays(pa.array(self._row_offsets), values)
        batch = pa.RecordBatch.from_arrays([rows], names=["pieces"])
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        write_batch(temporary, batch.replace_schema_metadata({_CHECKSUM: self._checksum()}))
        temporary.replace(path)

    @classmethod
    def open(cls, path: Path, row_tokens: int) -> Self | None:
        """Maps a table that `write` wrote; None if there is none, or it is damaged: make it anew then."""
        try:
            batch = read_batch(path)
            column = batch.column("pieces")
            begins, lengths = (column.values.field(name).to_numpy() for name in ("begin", "length"))
            packing = cls(row_tokens, begins, lengths, column.offsets.to_numpy())
        except (FileNotFoundError, KeyError, pa.ArrowException):
            return None
        return packing if (batch.schema.metadata or {}).get(_CHECKSUM) == packing._checksum() else None

    def _checksum(self) -> bytes:
        digest = xxhash.xxh3_128()
        for array in (self._begins, self._lengths, self._row_offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest().encode()


def document_packing(offsets: Ints, row_tokens: int) -> IndexPacking:
    """Layout `document` over the documents that lie between `offsets` of the stream."""
    lengths = np.minimum(np.diff(offsets), row_tokens + 1)
    return IndexPacking(row_tokens, offsets[:-1], lengths, np.arange(len(offsets), dtype=np.int64))


def best_fit_packing(offsets: Ints, row_tokens: int) -> IndexPacking:
    """Layout `best-fit` over the documents that lie between `offsets` of the stream.

    Measured: 0.7 to 1 million documents a second on one core, 500 tokens in the mean, 512 to 8,192 tokens a row.
    """
    documents = np.diff(offsets)
    counts = np.maximum(-(-(documents - 1) // row_tokens), 1)
    inside = _ramps(counts) * row_tokens
    begins = np.repeat(offsets[:-1], counts) + inside
    lengths = np.minimum(np.repeat(documents, counts) - inside, row_tokens + 1)
    order, row_offsets = best_fit(lengths, row_tokens + 1)
    return IndexPacking(row_tokens, begins[order], lengths[order], row_offsets)


def best_fit(sizes: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Packs items of `sizes` (1 to `capacity`) into rows of `capacity`: the largest first, each into the fullest row
    that has room for it.

    Returns the items' numbers row by row, and where each row begins among them (and the end). Items of one size are
    placed together, so the cost is that of the pairs (size, room left) that meet, not of the items.
    """
    order = np.argsort(-sizes, kind="stable").astype(np.int64)
    row_of = np.empty(len(sizes), dtype=np.int64)
    distinct, starts = np.unique(-sizes[order], return_index=True)
    stops = np.append(starts[1:], len(sizes))
    rooms = _Rooms(capacity)
    rows = 0
    for negative, start, stop in zip(distinct.tolist(), starts.tolist(), stops.tolist(), strict=True):
        size = -negative
        while start < stop:
            room = rooms.smallest(size)
            each = (room or capacity) // size
            wanted = -(-(stop - start) // each)
            if room is None:
                chosen = np.arange(rows, rows + wanted, dtype=np.int64)
                rows += wanted
            else:
                chosen = rooms.take(room, wanted)
            placed = np.repeat(chosen, each)[: stop - start]
            row_of[start : start + len(placed)] = placed
            start += len(placed)
            left = (room or capacity) - each * size
            spare = each * len(chosen) - len(placed)
            rooms.put(left, chosen[:-1] if spare else chosen)
            if spare:
                rooms.put(left + spare * size, chosen[-1:])
    by_row = np.argsort(row_of, kind="stable")
    row_offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=row_offsets[1:])
    return order[by_row], row_offsets


class _Rooms:
    """Rows by the room they have left, last put in first taken out."""

    def __init__(self, capacity: int) -> None:
        self._rows: list[list[Ints]] = [[] for _ in range(capacity + 1)]
        self._present = 0
        """Bit r is set if there is a row with room r."""

    def smallest(self, size: int) -> int | None:
        """The least room of at least `size`."""
        enough = self._present >> size
        return size + (enough & -enough).bit_length() - 1 if enough else None

    def put(self, room: int, rows: Ints) -> None:
        """Adds `rows`, which all have `room`; a full row is never asked for again."""
        if room and len(rows):
            self._rows[room].append(rows)
            self._present |= 1 << room

    def take(self, room: int, count: int) -> Ints:
        """Removes and returns up to `count` rows that have `room`."""
        held = self._rows[room]
        rows = held.pop()
        if len(rows) > count:
            held.append(rows[:-count])
            rows = rows[-count:]
        if not held:
            self._present &= ~(1 << room)
        return rows


def split_at(pieces: Pieces, offsets: Ints) -> Pieces:
    """The same tokens, in pieces that do not cross any of `offsets`: the bounds, first and last included, of the
    documents or shards that make up the stream.
    """
    ends = pieces.begins + pieces.lengths
    first = np.searchsorted(offsets, pieces.begins, side="right") - 1
    counts = np.searchsorted(offsets, ends, side="left") - first
    run = np.repeat(first, counts) + _ramps(counts)
    begins = np.maximum(np.repeat(pieces.begins, counts), offsets[run])
    lengths = np.minimum(np.repeat(ends, counts), offsets[run + 1]) - begins
    columns = np.repeat(pieces.columns - pieces.begins, counts) + begins
    return Pieces(np.repeat(pieces.rows, counts), columns, begins, lengths)


def _ramps(counts: Ints) -> Ints:
    """0..c-1 for each c of `counts`, one after the other."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)


@dataclass(frozen=True)
class PackedRows:
    """Rows of tokens and which of them belong together; T is `row_tokens`."""

    tokens: Ints
    """[rows, T + 1], int64; padding repeats the end-of-text token."""
    documents: npt.NDArray[np.int32]
    """[rows, T + 1]: number of the document within the row from 1; 0 is padding."""
    positions: Ints
    """[rows, T + 1]: place within the piece of a document, from 0; the position ids a model should be given."""

    @property
    def targets(self) -> npt.NDArray[np.bool_]:
        """[rows, T]: whether the prediction at t, of the token at t + 1, stays in one document."""
        return (self.documents[:, 1:] == self.documents[:, :-1]) & (self.documents[:, 1:] > 0)

    @property
    def cu_seqlens(self) -> npt.NDArray[np.int32]:
        """Bounds of the sequences in the inputs `tokens[:, :-1]`, flattened: what variable-length attention takes.

        A run of padding is a sequence of its own.
        """
        inputs = self.documents[:, :-1]
        begins = np.ones(inputs.shape, dtype=bool)
        begins[:, 1:] = inputs[:, 1:] != inputs[:, :-1]
        return np.append(np.flatnonzero(begins), inputs.size).astype(np.int32)


def describe_rows(tokens: Ints, pieces: Pieces) -> PackedRows:
    """The rows `tokens` with the documents they hold; `pieces` lie in one document each."""
    documents = np.zeros(tokens.size, dtype=np.int32)
    positions = np.zeros(tokens.size, dtype=np.int64)
    inside = _ramps(pieces.lengths)
    places = np.repeat(pieces.rows * tokens.shape[1] + pieces.columns, pieces.lengths) + inside
    _, first = np.unique(pieces.rows, return_index=True)
    number = np.arange(len(pieces.rows)) - np.repeat(first, np.diff(np.append(first, len(pieces.rows)))) + 1
    documents[places] = np.repeat(number, pieces.lengths)
    positions[places] = inside
    return PackedRows(tokens, documents.reshape(tokens.shape), positions.reshape(tokens.shape))
