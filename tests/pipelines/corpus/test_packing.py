import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.packing import (
    ConcatPacking,
    IndexPacking,
    Ints,
    PackedRows,
    Packing,
    Pieces,
    best_fit,
    best_fit_packing,
    describe_pieces,
    describe_stream,
    document_begins,
    document_packing,
)

lengths_of_documents = st.lists(st.integers(1, 60), min_size=1, max_size=60)
row_tokens = st.integers(1, 24)


def _offsets(lengths: list[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _rows(packing: Packing, offsets: Ints) -> tuple[Ints, PackedRows]:
    """Every row of a stream: where in the stream each token lies (-1 is padding), and the rows."""
    pieces = _pieces(packing, np.arange(packing.rows))
    places = np.full(packing.rows * (packing.row_tokens + 1), -1, dtype=np.int64)
    for place, begin, length in zip(pieces.places, pieces.begins, pieces.lengths, strict=True):
        assert (places[place : place + length] == -1).all()
        places[place : place + length] = np.arange(begin, begin + length)
    places = places.reshape(packing.rows, -1)
    if isinstance(packing, ConcatPacking):
        return places, describe_stream(places, [document_begins(pieces, offsets)])
    return places, describe_pieces(places, pieces)


def _pieces(packing: Packing, rows: Ints) -> Pieces:
    """The pieces of `rows`, one row after the other."""
    return packing.pieces(rows, np.arange(len(rows)) * (packing.row_tokens + 1))


def _check_boundaries(places: Ints, rows: PackedRows, offsets: Ints) -> None:
    """A position counts up exactly within one run of one document (or of padding), and cu_seqlens says the same."""
    document_of = np.where(places < 0, -1, np.searchsorted(offsets, places, side="right") - 1)
    following = places[:, 1:] == places[:, :-1] + (places[:, :-1] >= 0)
    following &= document_of[:, 1:] == document_of[:, :-1]
    assert np.array_equal(rows.held, places >= 0)
    assert not rows.positions[:, 0].any()
    assert np.array_equal(rows.positions[:, 1:], np.where(following, rows.positions[:, :-1] + 1, 0))
    assert np.array_equal(rows.targets, following & rows.held[:, 1:])
    bounds = rows.cu_seqlens
    assert (bounds[0], bounds[-1]) == (0, places[:, :-1].size)
    sequences = np.split(rows.positions[:, :-1].ravel(), bounds[1:-1])
    assert all(np.array_equal(sequence, np.arange(len(sequence))) for sequence in sequences)


@given(lengths_of_documents, row_tokens)
@settings(max_examples=150, deadline=None)
def test_best_fit_predicts_every_token_but_the_first_of_a_document_once(lengths: list[int], row_tokens: int) -> None:
    offsets = _offsets(lengths)
    packing = best_fit_packing(offsets, row_tokens)
    places, rows = _rows(packing, offsets)
    _check_boundaries(places, rows, offsets)
    assert sorted(places[:, 1:][rows.targets].tolist()) == sorted(set(range(offsets[-1])) - set(offsets[:-1].tolist()))


@given(lengths_of_documents, row_tokens)
@settings(max_examples=100, deadline=None)
def test_best_fit_never_cuts_a_document_that_fits_in_a_row(lengths: list[int], row_tokens: int) -> None:
    offsets = _offsets(lengths)
    packing = best_fit_packing(offsets, row_tokens)
    pieces = _pieces(packing, np.arange(packing.rows))
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
    packing = ConcatPacking(int(offsets[-1]), row_tokens)
    places, rows = _rows(packing, offsets)
    _check_boundaries(places, rows, offsets)
    assert np.array_equal(places, np.arange(packing.rows)[:, None] * row_tokens + np.arange(row_tokens + 1))
    report = packing.report(offsets)
    assert (report.padding, report.utilisation) == (0, 1.0)
    assert report.dropped == offsets[-1] - len(np.unique(places))
    held = [set(row.tolist()) for row in places]
    documents = [set(range(a, b)) for a, b in itertools.pairwise(offsets)]
    assert report.cut_documents == sum(not any(d <= h for h in held) for d in documents)


@given(lengths_of_documents, row_tokens)
@settings(max_examples=100, deadline=None)
def test_one_document_a_row_keeps_the_beginning_and_counts_the_rest(lengths: list[int], row_tokens: int) -> None:
    offsets = _offsets(lengths)
    packing = document_packing(offsets, row_tokens)
    places, rows = _rows(packing, offsets)
    _check_boundaries(places, rows, offsets)
    assert packing.rows == len(lengths)
    assert places[:, 0].tolist() == offsets[:-1].tolist()
    assert rows.held.sum(axis=1).tolist() == [min(n, row_tokens + 1) for n in lengths]
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
    assert np.array_equal(_rows(again, offsets)[0], _rows(packing, offsets)[0])
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
    every, _ = _rows(packing, offsets)
    pieces = _pieces(packing, np.array(rows))
    for number, row in enumerate(rows):
        mine = pieces.places // 9 == number
        held = [t for b, n in zip(pieces.begins[mine], pieces.lengths[mine], strict=True) for t in range(b, b + n)]
        assert held == every[row][every[row] >= 0].tolist()
        assert pieces.places[mine].tolist()[0] == 9 * number
