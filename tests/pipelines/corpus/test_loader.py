import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from corpus_files import document_batch, write_corpus
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import ContractError, CorruptArtifactError, DataError, InputError
from configs.schema.data import Layout, Phase
from pipelines.corpus.loader import Loader, Rowing
from pipelines.corpus.permutation import Permutation
from pipelines.corpus.reading import ShardFiles
from pipelines.corpus.shards import CorpusIndex

LENGTHS = [37, 250, 4, 91, 160, 33, 8, 120]
TOKENS = sum(LENGTHS)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def _write(folder: Path, stream: npt.NDArray[np.uint16], lengths: list[int], *, contract: str = "c") -> Path:
    """A corpus of documents of `lengths` cut from `stream`, in shards of a bit more than 200 tokens."""
    batch = document_batch(np.split(stream, np.cumsum(lengths)[:-1]))
    return write_corpus(folder, {"train": batch}, contract=contract)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split whose token stream counts up from 0, over several shards."""
    folder = _write(tmp_path_factory.mktemp("corpus"), np.arange(TOKENS, dtype=np.uint16), LENGTHS)
    assert len(list(folder.glob("shards/*"))) > 2
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, whose tokens count up from 10,000."""
    stream = np.arange(10_000, 10_900, dtype=np.uint16)
    return _write(tmp_path_factory.mktemp("other"), stream, [300, 20, 300, 280])


def _open(
    corpus: Path | ShardFiles, *, row_tokens: int = 16, batch_rows: int = 8, seed: int = 1, **more: Any
) -> Loader:
    return Loader.open(corpus, split="train", row_tokens=row_tokens, batch_rows=batch_rows, seed=seed, **more)


@given(st.integers(1, 3000), st.binary(max_size=8))
@example(1, b"")
@example(4, b"")
@settings(max_examples=60, deadline=None)
def test_the_permutation_is_a_bijection(size: int, key: bytes) -> None:
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


@given(st.integers(1, 1 << 63), st.data())
@settings(max_examples=60, deadline=None)
def test_the_permutation_stays_inside_any_size(size: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=20))
    images = Permutation(size, b"key")(np.array(positions, dtype=np.int64)).tolist()
    assert len(set(images)) == len(positions)
    assert all(0 <= image < size for image in images)


@pytest.mark.parametrize("size", [1_000, 10_007, 215_339])
def test_the_permutation_looks_random(size: int) -> None:
    """Pairs of rows next to each other, and a side of the Feistel rectangle apart, fall into 16 x 16 cells evenly."""
    side = math.isqrt(size - 1) + 1
    for lag in (1, 2, -(-size // side), side):
        statistics = []
        for key in range(20):
            cells = Permutation(size, str(key).encode())(np.arange(size)) * 16 // size
            counts = np.bincount(cells[lag:] * 16 + cells[:-lag], minlength=256)
            expected = (size - lag) / 256
            statistics.append(float(((counts - expected) ** 2 / expected).sum()))
        # A random order gives 225 +- 20 (each row and column of cells has its size) for one key.
        assert abs(np.mean(statistics) - 225) < 20


def test_rows_are_the_stream_with_the_token_that_follows(corpus: Path) -> None:
    loader = _open(corpus)
    assert loader.rows_per_epoch == (TOKENS - 1) // 16
    assert (loader.tokens, loader.bytes_per_token) == (TOKENS, 2.0)
    every = loader.rows(loader.rows_per_epoch)
    assert np.array_equal(every, np.arange(loader.rows_per_epoch)[:, None] * 16 + np.arange(17))
    assert every.dtype == np.int64


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(corpus: Path) -> None:
    loader = _open(corpus, batch_rows=1)
    n = loader.rows_per_epoch
    epochs = [[int(loader.batch(step)[0, 0]) // 16 for step in range(e * n, (e + 1) * n)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_slices_of_all_ranks_are_the_same_global_batch(corpus: Path, world_size: int) -> None:
    loader = _open(corpus)
    for step in (0, 5, 6, 1000):
        slices = [_open(corpus).batch(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(slices), loader.batch(step))


def test_any_step_can_be_read_first(corpus: Path) -> None:
    straight = _open(corpus)
    batches = [straight.batch(step) for step in range(20)]
    assert np.array_equal(_open(corpus).batch(17), batches[17])
    assert not np.array_equal(_open(corpus, seed=2).batch(17), batches[17])
    assert _open(corpus).batch(10**12).shape == (8, 17)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_the_same_in_whatever_order_steps_are_read(corpus: Path, other: Path, layout: Layout) -> None:
    """A reader that goes step by step is given parts of longer stretches; these run over epochs and phases."""
    phases = Phase(weights={"a": 3, "b": 1}), Phase(from_step=7, weights={"a": 1, "b": 3})
    loader = _mix({"a": corpus, "b": other}, *phases, layout=layout)
    for step in (0, 1, 2, 6, 7, 8, 3, 4, 5, 5, 9, 10, 700, 701, 2, 3, 6, 7):
        fresh = _mix({"a": corpus, "b": other}, *phases, layout=layout).packed(step)
        packed = loader.packed(step)
        for found, expected in zip(
            (loader.batch(step), *vars(packed).values()), (fresh.tokens, *vars(fresh).values()), strict=True
        ):
            assert np.array_equal(found, expected)
            found[:] = 0  # who asks for a batch may write to it


def test_rows_for_evaluation_are_spread_over_the_split(corpus: Path) -> None:
    loader = _open(corpus)
    starts = loader.rows(5)[:, 0]
    assert starts.tolist() == [i * loader.rows_per_epoch // 5 * 16 for i in range(5)]
    assert len(loader.rows(10**6)) == loader.rows_per_epoch


def test_a_row_longer_than_a_shard_is_put_together(corpus: Path) -> None:
    assert np.array_equal(_open(corpus, row_tokens=600).rows(1)[0], np.arange(601))


@pytest.mark.parametrize(("rank", "world_size", "step"), [(0, 3, 0), (2, 2, 0), (-1, 2, 0), (0, 1, -1)])
def test_an_impossible_division_is_an_error(corpus: Path, rank: int, world_size: int, step: int) -> None:
    with pytest.raises(InputError, match="batch_rows"):
        _open(corpus).batch(step, rank, world_size)


def test_an_unknown_or_short_split_is_an_error(corpus: Path) -> None:
    with pytest.raises(DataError, match="'test'; allowed: train"):
        Loader.open(corpus, split="test", row_tokens=8, batch_rows=1, seed=1)
    with pytest.raises(DataError, match="shorter than one row"):
        _open(corpus, row_tokens=TOKENS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_changing_number_of_workers_keeps_the_ledger_and_the_tokens(
    corpus: Path, other: Path, layout: Layout, mixed: bool
) -> None:
    """1 worker, then 3, then 2, each starting anew in the middle of an epoch and of a phase of the mixture."""
    phases = Phase(weights={"a": 2, "b": 1}), Phase(from_step=10, weights={"a": 1, "b": 1})

    def opened() -> Loader:
        if mixed:
            return _mix({"a": corpus, "b": other}, *phases, layout=layout, batch_rows=6)
        return _open(corpus, batch_rows=6, layout=layout)

    straight = opened()
    samples, tokens, positions = [], [], []
    for world_size, steps in ((1, range(3)), (3, range(3, 8)), (2, range(8, 20))):
        workers = [opened() for _ in range(world_size)]
        for step in steps:
            for rank, worker in enumerate(workers):
                samples.append(worker.ledger(step, rank, world_size))
                tokens.append(worker.batch(step, rank, world_size))
                positions.append(worker.packed(step, rank, world_size).positions)
    assert np.array_equal(np.concatenate(samples), np.concatenate([straight.ledger(s) for s in range(20)]))
    assert np.array_equal(np.concatenate(tokens), np.concatenate([straight.batch(s) for s in range(20)]))
    assert np.array_equal(np.concatenate(positions), np.concatenate([straight.packed(s).positions for s in range(20)]))
    counted = np.bincount(np.concatenate(samples)[:, 0]).tolist()
    assert counted == list(straight.samples(20).values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows_never_mix_documents(corpus: Path, layout: Layout) -> None:
    loader = _open(corpus, layout=layout, batch_rows=12)
    document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for step in range(12):
        rows = loader.packed(step)
        assert np.array_equal(rows.tokens, loader.batch(step))
        before, after, targets = rows.tokens[:, :-1], rows.tokens[:, 1:], rows.targets
        together = (document_of[before] == document_of[after]) & (after == before + 1)
        assert np.array_equal(targets, together & rows.held[:, 1:])
        slices = [loader.packed(step, rank, 3) for rank in range(3)]
        assert np.array_equal(np.concatenate([s.positions for s in slices]), rows.positions)
    every = loader.packed_rows(10**6)
    assert np.array_equal(every.tokens, loader.rows(10**6))
    assert every.held.any(axis=1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_knows_the_documents_it_holds(corpus: Path, other: Path, layout: Layout) -> None:
    loader = _mix({"a": corpus, "b": other}, Phase(weights={"a": 1, "b": 1}), layout=layout)
    document_of = np.concatenate([np.repeat(np.arange(len(LENGTHS)), LENGTHS), np.repeat(-1, 10_000 - TOKENS)])
    document_of = np.append(document_of, np.repeat(np.arange(4), [300, 20, 300, 280]))
    for step in range(9):
        rows, samples = loader.packed(step), loader.provenance(step)
        assert [[("a", "b").index(s.source), s.epoch, s.row] for s in samples] == loader.ledger(step).tolist()
        for tokens, held, sample in zip(rows.tokens, rows.held, samples, strict=True):
            assert set(sample.documents) == set(document_of[tokens[held]].tolist())


def test_each_layout_says_what_it_does_to_the_documents(corpus: Path) -> None:
    reports = {layout: _open(corpus, layout=layout, row_tokens=99).packing_reports()[""] for layout in LAYOUTS}
    assert {layout: r.cut_documents for layout, r in reports.items()} == {"concat": 4, "best_fit": 3, "one_document": 3}
    assert reports["one_document"].dropped == 150 + 60 + 20
    assert reports["best_fit"].dropped == 0
    assert reports["best_fit"].utilisation > reports["one_document"].utilisation


def test_an_index_that_was_kept_gives_the_same_rows(corpus: Path, tmp_path: Path) -> None:
    first = _open(corpus, layout="best_fit", indexes=tmp_path / "indexes")
    batches = [first.batch(step) for step in range(9)]
    (kept,) = (tmp_path / "indexes").iterdir()
    written = kept.stat().st_mtime_ns
    again = _open(corpus, layout="best_fit", indexes=tmp_path / "indexes")
    assert np.array_equal([again.batch(step) for step in range(9)], batches)
    kept.write_bytes(b"damaged")
    mended = _open(corpus, layout="best_fit", indexes=tmp_path / "indexes")
    assert np.array_equal([mended.batch(step) for step in range(9)], batches)
    assert kept.stat().st_mtime_ns > written


def _mix(
    corpora: Mapping[str, Path | ShardFiles], *phases: Phase, layout: Layout = "concat", batch_rows: int = 8
) -> Loader:
    return Loader.mix(corpora, phases, Rowing("train", 16, layout), batch_rows=batch_rows, seed=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixture_gives_every_batch_its_share_and_changes_at_its_step(
    corpus: Path, other: Path, layout: Layout
) -> None:
    phases = Phase(weights={"a": 3, "b": 1}), Phase(from_step=5, weights={"a": 0, "b": 1})
    corpora: dict[str, Path | ShardFiles] = {"b": other, "a": corpus}
    loader = _mix(corpora, *phases, layout=layout)
    for step in range(10):
        batch = loader.batch(step)
        ledger = loader.ledger(step)
        assert np.array_equal(batch[:, 0] >= 10_000, ledger[:, 0] == 1)
        assert (ledger[:, 0] == 1).sum() == (2 if step < 5 else 8)
        assert np.array_equal(loader.packed(step).tokens, batch)
        slices = [_mix(corpora, *phases, layout=layout).batch(step, rank, 4) for rank in range(4)]
        assert np.array_equal(np.concatenate(slices), batch)
    assert loader.rows_per_epoch == sum(_open(c, layout=layout).rows_per_epoch for c in (corpus, other))
    every = loader.rows(10**6)
    assert len(every) == loader.rows_per_epoch
    assert (every[:, 0] >= 10_000).any()


def test_a_mixture_visits_every_row_of_a_source_once_an_epoch(corpus: Path, other: Path) -> None:
    loader = _mix({"a": corpus, "b": other}, Phase(weights={"a": 1, "b": 3}))
    ledger = np.concatenate([loader.ledger(step) for step in range(60)])
    for number, source in enumerate((corpus, other)):
        rows = ledger[(ledger[:, 0] == number) & (ledger[:, 1] == 0), 2]
        assert sorted(rows.tolist()) == list(range(_open(source).rows_per_epoch))


def test_a_mixture_of_what_does_not_go_together_is_an_error(corpus: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="allowed: a, c"):
        _mix({"a": corpus, "c": other}, Phase(weights={"a": 1, "b": 1}))
    stranger = _write(tmp_path, np.arange(900, dtype=np.uint16), [900], contract="another")
    with pytest.raises(ContractError, match="corpora a and b were made with different tokenizers"):
        _mix({"a": corpus, "b": stranger}, Phase(weights={"a": 1, "b": 1}))


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # a mapping of the old file stays as it was
    path.write_bytes(content)


def test_a_damaged_shard_stops_the_batch_and_is_named(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    path = tmp_path / "copy/shards/train-00001.arrow"
    wanted = CorpusIndex.load(corpus).splits["train"].shards[1].blocks[0]
    _damage(path)
    with pytest.raises(CorruptArtifactError, match=rf"train-00001\.arrow is damaged at byte 0.*xxh3.*xxh3 {wanted}"):
        _open(tmp_path / "copy").rows(10**6)
