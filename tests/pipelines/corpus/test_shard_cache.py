"""A corpus in an object store; a folder behind `SubTreeFileSystem` stands in for the store."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest
from corpus_files import document_batch, write_corpus

from configs.errors import ArtifactError, ConfigError, CorruptArtifactError, DataError, StorageError
from configs.schema.data import Phase
from pipelines.corpus.loader import Loader, Rowing
from pipelines.corpus.shard_cache import ShardCache
from pipelines.corpus.shards import CorpusIndex


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """A corpus of 10 shards of 1,000 tokens below `demo@1`."""
    documents = np.arange(10_000, dtype=np.uint16).reshape(10, 1000)
    write_corpus(tmp_path / "bucket/demo@1", {"train": document_batch(list(documents))}, shard_tokens=1000)
    return tmp_path / "bucket"


def _cache(bucket: Path, folder: Path, max_bytes: int = 1 << 20) -> ShardCache:
    return ShardCache(pa.fs.SubTreeFileSystem(str(bucket), pa.fs.LocalFileSystem()), "demo@1", folder, max_bytes)


def _open(cache: ShardCache) -> Loader:
    return Loader.open(cache, split="train", row_tokens=64, batch_rows=4, seed=3)


def _held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_remote_corpus_gives_the_batches_of_a_local_one(bucket: Path, tmp_path: Path) -> None:
    local = Loader.open(bucket / "demo@1", split="train", row_tokens=64, batch_rows=4, seed=3)
    remote = _open(_cache(bucket, tmp_path / "cache"))
    for step in range(60):
        assert np.array_equal(remote.batch(step), local.batch(step))
    shutil.rmtree(bucket / "demo@1/shards")
    assert np.array_equal(remote.batch(61), local.batch(61))


def test_the_cache_stays_within_its_bound_and_the_batches_stay_right(bucket: Path, tmp_path: Path) -> None:
    local = Loader.open(bucket / "demo@1", split="train", row_tokens=64, batch_rows=4, seed=3)
    shard = (bucket / "demo@1/shards/train-00000.arrow").stat().st_size
    bound = 3 * shard + 10
    remote = _open(_cache(bucket, tmp_path / "cache", bound))
    for step in range(40):
        assert np.array_equal(remote.batch(step), local.batch(step))
        assert 0 < _held(tmp_path / "cache") <= bound


def test_a_damaged_copy_is_fetched_again(bucket: Path, tmp_path: Path) -> None:
    local = Loader.open(bucket / "demo@1", split="train", row_tokens=64, batch_rows=4, seed=3)
    _open(_cache(bucket, tmp_path / "cache")).rows(10**6)
    for number, path in enumerate(sorted((tmp_path / "cache").iterdir())):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: -1 - number] if number % 2 else content)
    remote = _open(_cache(bucket, tmp_path / "cache"))
    assert np.array_equal(remote.rows(10**6), local.rows(10**6))


def test_damage_in_the_store_itself_stops_with_offset_and_digests(bucket: Path, tmp_path: Path) -> None:
    path = bucket / "demo@1/shards/train-00004.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    wanted = CorpusIndex.load(bucket / "demo@1").splits["train"].shards[4].blocks[0]
    with pytest.raises(CorruptArtifactError, match=rf"train-00004\.arrow .* is damaged at byte 0.*xxh3 {wanted}"):
        _open(_cache(bucket, tmp_path / "cache")).rows(10**6)


def test_a_mixture_of_packed_remote_corpora_gives_what_local_ones_do(bucket: Path, tmp_path: Path) -> None:
    """One of them in another place too, whose copies are damaged on the way; the cache holds but three shards."""
    shutil.copytree(bucket, tmp_path / "elsewhere")
    shard = (bucket / "demo@1/shards/train-00000.arrow").stat().st_size
    phases, rowing = [Phase(weights={"a": 2, "b": 1})], Rowing("train", 64, "best_fit")
    places = {"a": bucket, "b": tmp_path / "elsewhere"}

    def opened(remote: bool) -> Loader:
        corpora = {
            name: _cache(place, tmp_path / "cache", 3 * shard) if remote else place / "demo@1"
            for name, place in places.items()
        }
        return Loader.mix(corpora, phases, rowing, batch_rows=6, seed=3)

    local, remote = opened(False), opened(True)
    for step in range(30):
        assert np.array_equal(remote.packed(step).tokens, local.packed(step).tokens)
        assert _held(tmp_path / "cache") <= 3 * shard
        if step % 5 == 0:
            for path in (tmp_path / "cache").iterdir():
                size = path.stat().st_size
                path.unlink()  # who reads it still holds the copy that was checked
                path.write_bytes(b"?" * size)


def test_two_loaders_share_copies(bucket: Path, tmp_path: Path) -> None:
    _open(_cache(bucket, tmp_path / "cache")).rows(10**6)
    shutil.rmtree(bucket / "demo@1/shards")
    assert len(_open(_cache(bucket, tmp_path / "cache")).rows(10**6)) == 156


def test_what_cannot_be_fetched_or_held_is_an_error(bucket: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"index\.json"):
        _open(ShardCache(pa.fs.LocalFileSystem(), str(tmp_path / "nothing"), tmp_path / "cache", 1 << 20))
    with pytest.raises(DataError, match="demo@1 has no such split"):
        Loader.open(_cache(bucket, tmp_path / "cache"), split="test", row_tokens=64, batch_rows=4, seed=3)
    with pytest.raises(ConfigError, match="smaller than a shard"):
        _open(_cache(bucket, tmp_path / "cache", 100)).batch(0)
    shutil.rmtree(bucket / "demo@1/shards")
    with pytest.raises(StorageError, match="is gone"):
        _open(_cache(bucket, tmp_path / "cache")).batch(0)
    with pytest.raises(ConfigError, match="s3://"):
        ShardCache.open("s4://bucket/demo@1", tmp_path, 1 << 20)


def test_a_file_uri_is_a_store(bucket: Path, tmp_path: Path) -> None:
    cache = ShardCache.open((bucket / "demo@1").as_uri(), tmp_path / "cache", 1 << 20)
    assert _open(cache).batch(0).shape == (4, 65)
