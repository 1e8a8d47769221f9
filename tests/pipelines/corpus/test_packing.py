import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.packing import (
    ChunkPacking,
    IndexPacking,
    Ints,
    PackedRows,
    Packing,
    best_fit,
    best_fit_packing,
    describe_rows,
    document_packing,
    split_at,
)

lengths_of_documents = st.lists(st.integers(1, 60), min_size=1, max_size=60)
row_tokens = st.integers(1, 24)


def _offsets(lengths: list[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _rows(packing: Packing, offsets: Ints) -> PackedRows:
    """Every row of a stream whose token at place p is p; padding is -1."""
    pieces = split_at(packing.pieces(np.arange(packing.rows)), offsets)
    tokens = np.full((packing.rows, packing.row_tokens + 1), -1, dtype=np.int64)
    for row, column, begin, length in zip(pieces.rows, pieces.columns, pieces.begins, pieces.lengths, strict=True):
        assert (tokens[row, column : column + length] == -1).all()
        tokens[row, column : column + length] = np.arange(begin, begin + length)
    return describe_rows(tokens, pieces)


def _predicted(rows: PackedRows) -> list[int]:
    """Places in the stream of all tokens that are a target."""
    return sorted(rows.tokens[:, 1:][rows.targets].tolist())


def _check_boundaries(rows: PackedRows, offsets: Ints) -> None:
    """Tokens share a number only within one document, positions count up from 0, and cu_seqlens says the same."""
    document_of = np.searchsorted(offsets, rows.tokens, side="right") - 1
    assert np.array_equal(rows.documents == 0, rows.tokens == -1)
    same = rows.documents[:, 1:] == rows.documents[:, :-1]
    held = rows.documents[:, 1:] > 0
    assert np.array_equal(rows.tokens[:, 1:][same & held], rows.tokens[:, :-1][same & held] + 1)
    assert np.array_equal(document_of[:, 1:][same & held], document_of[:, :-1][same & held])
    assert np.array_equal(rows.positions[:, 1:][same & held], rows.positions[:, :-1][same & held] + 1)
    assert not rows.positions[:, 1:][~same].any()
    flat_documents, flat_rows = rows.documents[:, :-1].ravel(), np.arange(rows.documents[:, :-1].size)
    bounds = rows.cu_seqlens
    assert bounds[0] == 0
    assert bounds[-1] == flat_documents.size
    for begin, end in itertools.pairwise(bounds):
        assert end > begin
        assert len(set(flat_documents[begin:end])) == 1
        assert len(set(flat_rows[begin:end] // (rows.documents.shape[1] - 1))) == 1


@given(lengths_of_documents, row_tokens)
@settings(max_examples=150, deadline=None)
def test_best_fit_predicts_every_token_but_the_first_of_a_document_once(lengths: list[int], row_tokens: int) -> None:
    offsets = _offsets(lengths)
    packing = best_fit_packing(offsets, row_tokens)
    rows = _rows(packing, offsets)
    _check_boundaries(rows, offsets)
    assert _predicted(rows) == sorted(set(range(offsets[-1])) - set(offsets[:-1].tolist()))


@given(lengths_of_documents, row_tokens)
@settings(max_examples=100, deadline=None)
def test_best_fit_never_cuts_a_document_that_fits_in_a_row(lengths: list[int], row_tokens: int) -> None:
    offsets = _offsets(lengths)
    packing = best_fit_packing(offsets, row_tokens)
    pieces = packing.pieces(np.arange(packing.rows))
    whole = {(b, n) for b, n in zip(pieces.begins.tolist(), pieces.lengths.tolist(), strict=True)}
    for begin, length in zip(offsets[:-1].tolist(), lengths, strict=True):
        assert length > row_tokens + 1 or (begin, length) in whole
    report = packing.report(offsets)
    assert report.dropped == 0
    assert report.cut_documents == sum(length > row_tokens + 1 for length in lengths)
    assert report.padding == packing.rows * (row_tokens + 1) - int(pieces.lengths.sum())


@given(lengths_of_documents, row_tokens)
@settings(max_examples=100, deadline=None)
def test_chunks_hold_the_stream_and_know_its_documents(lengths: list[int], row_tokens: int) -> None:
    offsets = _offsets([*lengths, row_tokens + 1])
    packing = ChunkPacking(int(offsets[-1]), row_tokens)
    rows = _rows(packing, offsets)
    _check_boundaries(rows, offsets)
    assert np.array_equal(rows.tokens, np.arange(packing.rows)[:, None] * row_tokens + np.arange(row_tokens + 1))
    report = packing.report(offsets)
    assert (report.padding, report.utilisation) == (0, 1.0)
    assert report.dropped == offsets[-1] - len(np.unique(rows.tokens))
    held = [set(row.tolist()) for row in rows.tokens]
    documents = [set(range(a, b)) for a, b in itertools.pairwise(offsets)]
    assert report.cut_documents == sum(not any(d <= h for h in held) for d in documents)


@given(lengths_of_documents, row_tokens)
@settings(max_examples=100, deadline=None)
def test_one_document_a_row_keeps_the_beginning_and_counts_the_rest(lengths: list[int], row_tokens: int) -> None:
    offsets = _offsets(lengths)
    packing = document_packing(offsets, row_tokens)
    rows = _rows(packing, offsets)
    _check_boundaries(rows, offsets)
    assert packing.rows == len(lengths)
    assert rows.tokens[:, 0].tolist() == offsets[:-1].tolist()
    assert (rows.documents > 0).sum(axis=1).tolist() == [min(n, row_tokens + 1) for n in lengths]
    report = packing.report(offsets)
    assert report.dropped == sum(max(0, n - row_tokens - 1) for n in lengths)
    assert report.truncation == sum(n > row_tokens + 1 for n in lengths) / len(lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80))
@settings(max_examples=150, deadline=None)
def test_best_fit_puts_each_item_in_the_fullest_row_with_room(sizes: list[int]) -> None:
    order, row_offsets = best_fit(np.array(sizes, dtype=np.int64), 30)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    filled = sorted(sum(sizes[i] for i in order[a:b]) for a, b in itertools.pairwise(row_offsets))
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        room = min((r for r in rooms if r >= size), default=None)
        if room is None:
            room = 30
        else:
            rooms.remove(room)
        rooms.append(room - size)
    assert filled == sorted(30 - room for room in rooms)


def test_a_written_index_is_the_same_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    offsets = _offsets([5, 40, 7, 7, 1, 16])
    packing = best_fit_packing(offsets, 16)
    path = tmp_path / "index.arrow"
    assert IndexPacking.open(path, 16) is None
    packing.write(path)
    again = IndexPacking.open(path, 16)
    assert again is not None
    assert np.array_equal(_rows(again, offsets).tokens, _rows(packing, offsets).tokens)
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[content.index(2 * (17).to_bytes(8, "little"))] ^= 1  # the lengths of two full pieces
    path.write_bytes(damaged)
    assert IndexPacking.open(path, 16) is None
    path.write_bytes(content[:-9])
    assert IndexPacking.open(path, 16) is None


@pytest.mark.parametrize("rows", [[0], [2, 0, 2, 1]])
def test_rows_can_be_asked_for_in_any_order(rows: list[int]) -> None:
    offsets = _offsets([9, 4, 4, 3, 20, 2])
    packing = best_fit_packing(offsets, 8)
    every = _rows(packing, offsets)
    pieces = packing.pieces(np.array(rows))
    for number, row in enumerate(rows):
        mine = pieces.rows == number
        held = [t for b, n in zip(pieces.begins[mine], pieces.lengths[mine], strict=True) for t in range(b, b + n)]
        assert held == every.tokens[row][every.tokens[row] >= 0].tolist()
        assert pieces.columns[mine].tolist()[0] == 0
