import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from corpus_files import write_split

from configs.errors import ArtifactError, CorruptArtifactError
from pipelines.corpus.reading import ShardFolder, ShardReader
from pipelines.corpus.shards import (
    BLOCK_BYTES,
    CorpusIndex,
    SplitRecord,
    document_schema,
    token_column,
)


def _documents(lengths: list[int], first: int = 0) -> pa.RecordBatch:
    tokens = [np.arange(n, dtype=np.uint16) + 7 * (first + i) for i, n in enumerate(lengths)]
    columns = [
        pa.array([f"{first + i}.py" for i in range(len(lengths))]),
        pa.array([3 * n for n in lengths], pa.uint64()),
        pa.array(["00"] * len(lengths)),
        token_column(tokens, "uint16"),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=document_schema("uint16"))


def _stream(folder: Path, record: SplitRecord) -> list[int]:
    readers = [ShardReader.open(ShardFolder(folder), shard, BLOCK_BYTES) for shard in record.shards]
    return [t for r, s in zip(readers, record.shards, strict=True) for t in r.read(0, s.tokens).tolist()]


def test_shards_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    record = write_split(tmp_path, "train", [_documents([5, 6, 1]), _documents([20, 3], first=3)], shard_tokens=10)
    assert [(s.path, s.documents, s.tokens) for s in record.shards] == [
        ("shards/train-00000.arrow", 2, 11),
        ("shards/train-00001.arrow", 2, 21),
        ("shards/train-00002.arrow", 1, 3),
    ]
    assert (record.documents, record.tokens, record.text_bytes) == (5, 35, 105)
    expected = [*range(5), *range(7, 13), 14, *range(21, 41), *range(28, 31)]
    assert _stream(tmp_path, record) == expected


def test_shards_do_not_depend_on_how_documents_came_in(tmp_path: Path) -> None:
    whole = [_documents([5, 6, 1, 20, 3])]
    pieces = [_documents([5]), _documents([], 1), _documents([6, 1], 1), _documents([20, 3], 3)]
    records = [write_split(tmp_path / name, "train", b, 10) for name, b in (("a", whole), ("b", pieces))]
    assert records[0] == records[1]
    for shard in records[0].shards:
        assert (tmp_path / "a" / shard.path).read_bytes() == (tmp_path / "b" / shard.path).read_bytes()


def test_a_shard_opens_with_arrow_alone(tmp_path: Path) -> None:
    write_split(tmp_path, "validation", [_documents([2, 3])], shard_tokens=100)
    table = pa.ipc.open_file(tmp_path / "shards/validation-00000.arrow").read_all()
    assert table.to_pylist()[1] == {"name": "1.py", "size_bytes": 9, "blake3": "00", "tokens": [7, 8, 9]}


@pytest.mark.parametrize("block", [0, 1, -1])
def test_a_damaged_block_is_found_when_it_is_read(tmp_path: Path, block: int) -> None:
    record = write_split(tmp_path, "train", [_documents([60_000] * 8)], shard_tokens=1 << 30).shards[0]
    assert len(record.blocks) == 4
    path = tmp_path / record.path
    content = bytearray(path.read_bytes())
    position = (block % 4) * BLOCK_BYTES + 200
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=rf"train-00000\.arrow is damaged at byte {block % 4 * BLOCK_BYTES}"):
        ShardReader.open(ShardFolder(tmp_path), record, BLOCK_BYTES).read(0, record.tokens)


def test_only_blocks_that_are_read_are_checked(tmp_path: Path) -> None:
    record = write_split(tmp_path, "train", [_documents([60_000] * 8)], shard_tokens=1 << 30).shards[0]
    path = tmp_path / record.path
    content = bytearray(path.read_bytes())
    content[2 * BLOCK_BYTES + 9] ^= 1
    path.write_bytes(content)
    reader = ShardReader.open(ShardFolder(tmp_path), record, BLOCK_BYTES)
    assert reader.read(1000, 1003).tolist() == [1000, 1001, 1002]
    with pytest.raises(CorruptArtifactError, match=record.blocks[2]):
        reader.read(2 * BLOCK_BYTES // 2, 2 * BLOCK_BYTES // 2 + 10)


def test_a_missing_or_cut_shard_is_an_error(tmp_path: Path) -> None:
    record = write_split(tmp_path, "train", [_documents([50])], shard_tokens=100).shards[0]
    path = tmp_path / record.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifactError, match="damaged"):
        ShardReader.open(ShardFolder(tmp_path), record, BLOCK_BYTES)
    path.unlink()
    with pytest.raises(CorruptArtifactError, match="damaged"):
        ShardReader.open(ShardFolder(tmp_path), record, BLOCK_BYTES)


def test_a_folder_that_is_no_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"index\.json"):
        CorpusIndex.load(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(CorruptArtifactError, match="not a corpus index"):
        CorpusIndex.load(tmp_path)
