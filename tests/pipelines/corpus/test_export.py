import struct
from pathlib import Path

import numpy as np
import pytest
from corpus_files import document_batch, write_corpus

from configs.errors import CorruptArtifactError, DataError, InputError, StorageError
from pipelines.corpus.export import export_megatron

LENGTHS = [37, 250, 4, 91, 160]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    stream = np.arange(sum(LENGTHS), dtype=np.uint16)
    batch = document_batch(np.split(stream, np.cumsum(LENGTHS)[:-1]))
    return write_corpus(tmp_path / "corpus", {"train": batch, "validation": document_batch([stream[:5]])})


def _read(prefix: Path) -> list[list[int]]:
    """Documents, read from the two files by the layout that Megatron-Core documents."""
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, bounds = struct.unpack_from("<QBQQ", index, 9)
    assert (version, code) == (1, 8)
    assert bounds == sequences + 1
    begin = 9 + 8 + 1 + 8 + 8
    lengths = np.frombuffer(index, "<i4", sequences, begin)
    pointers = np.frombuffer(index, "<i8", sequences, begin + lengths.nbytes)
    documents = np.frombuffer(index, "<i8", bounds, begin + lengths.nbytes + pointers.nbytes)
    assert len(index) == begin + lengths.nbytes + pointers.nbytes + documents.nbytes
    assert documents.tolist() == list(range(bounds))
    tokens = prefix.with_name(prefix.name + ".bin").read_bytes()
    assert pointers[-1] + 2 * lengths[-1] == len(tokens)
    return [np.frombuffer(tokens, "<u2", n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]


def test_the_files_hold_every_document_of_the_split(corpus: Path, tmp_path: Path) -> None:
    written = export_megatron(corpus, "train", tmp_path / "new/demo.v1_text")
    assert (written.documents, written.token_count) == (5, sum(LENGTHS))
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"demo.v1_text.bin", "demo.v1_text.idx"}
    documents = _read(tmp_path / "new/demo.v1_text")
    assert [len(d) for d in documents] == LENGTHS
    assert [t for d in documents for t in d] == list(range(sum(LENGTHS)))
    export_megatron(corpus, "validation", tmp_path / "held")
    assert _read(tmp_path / "held") == [[0, 1, 2, 3, 4]]


def test_nothing_is_overwritten_and_an_unknown_split_is_named(corpus: Path, tmp_path: Path) -> None:
    export_megatron(corpus, "train", tmp_path / "demo")
    with pytest.raises(InputError, match=r"demo\.bin is there already"):
        export_megatron(corpus, "train", tmp_path / "demo")
    with pytest.raises(DataError, match="'test'; allowed: train, validation"):
        export_megatron(corpus, "test", tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        export_megatron(corpus, "train", tmp_path / "file/demo")


def test_a_damaged_corpus_gives_no_files(corpus: Path, tmp_path: Path) -> None:
    path = corpus / "shards/train-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="train-00001"):
        export_megatron(corpus, "train", tmp_path / "out/demo")
    assert not list((tmp_path / "out").iterdir())
