from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import CorruptArtifactError, DataError, InputError
from pipelines.corpus.loader import Loader, Permutation
from pipelines.corpus.shards import BLOCK_BYTES, INDEX, CorpusIndex, document_schema, token_column, write_split

LENGTHS = [37, 250, 4, 91, 160, 33, 8, 120]
TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split whose token stream counts up from 0, over several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    stream = np.arange(TOKENS, dtype=np.uint16)
    documents = np.split(stream, np.cumsum(LENGTHS)[:-1])
    columns = [
        pa.array([str(i) for i in range(len(LENGTHS))]),
        pa.array([2 * n for n in LENGTHS], pa.uint64()),
        pa.array(["00"] * len(LENGTHS)),
        token_column(documents, "uint16"),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=document_schema("uint16"))
    record = write_split(folder, "train", [batch], shard_tokens=200)
    assert len(record.shards) > 2
    index = CorpusIndex(
        dtype="uint16", vocab_size=TOKENS, end_of_text_id=0, contract="c", block_bytes=BLOCK_BYTES,
        splits={"train": record},
    )  # fmt: skip
    (folder / INDEX).write_text(index.model_dump_json())
    return folder


def _open(corpus: Path, *, row_tokens: int = 16, batch_rows: int = 8, seed: int = 1) -> Loader:
    return Loader.open(corpus, split="train", row_tokens=row_tokens, batch_rows=batch_rows, seed=seed)


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
    images = Permutation(size, b"key")(positions).tolist()
    assert len(set(images)) == len(positions)
    assert all(0 <= image < size for image in images)


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


def test_a_damaged_shard_stops_the_batch(corpus: Path, tmp_path: Path) -> None:
    for source in [*corpus.glob("shards/*"), corpus / INDEX]:
        target = tmp_path / source.relative_to(corpus)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    path = tmp_path / "shards/train-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"train-00001\.arrow is damaged at byte 0"):
        _open(tmp_path)
