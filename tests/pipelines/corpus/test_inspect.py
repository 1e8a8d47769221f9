from pathlib import Path

import blake3
import numpy as np
import pytest
from corpus_files import END_OF_TEXT, document_batch, write_byte_tokenizer, write_corpus, write_text_corpus

from configs.errors import ContractError, DataError, InputError
from pipelines.corpus.inspect import Inspector

TEXTS = [f"Document {n}: naïve — 日本語 🤖\r\n\tline {n}\x00" + "x" * 5 * n for n in range(12)]
TEXTS.append(f"the characters {END_OF_TEXT[:5]}")


@pytest.fixture
def inspector(tmp_path: Path) -> Inspector:
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer")
    corpus = write_text_corpus(
        tmp_path / "corpus", {"train": TEXTS, "validation": ["held out", "twin", "twin"]}, tokenizer
    )
    return Inspector.open(corpus, tmp_path / "tokenizer")


def test_every_document_is_shown_as_it_was(inspector: Inspector) -> None:
    for number, text in enumerate(TEXTS):
        document = inspector.document("train", number)
        assert document.text == text
        assert document.id == f"train/{number}"
        assert document.origin["name"] == f"{number}.txt"
        assert document.origin["blake3"] == blake3.blake3(text.encode()).hexdigest()
        assert len(document.tokens) == len(text.encode()) + 1
        assert (document.tokens[-1].id, document.tokens[-1].piece) == (0, END_OF_TEXT)
    assert inspector.document("train", 12).shard > inspector.document("train", 0).shard


def test_a_document_is_found_by_number_name_or_hash(inspector: Inspector) -> None:
    digest = blake3.blake3(TEXTS[7].encode()).hexdigest()
    for identifier in ("train/7", "7.txt", digest, digest[:8]):
        assert inspector.find(identifier).text == TEXTS[7]
    with pytest.raises(InputError, match=r"validation/1, validation/2"):
        inspector.find(blake3.blake3(b"twin").hexdigest())
    for identifier in ("train/13", "none.txt", digest[:7], "test/0"):
        with pytest.raises(DataError, match="no such document"):
            inspector.find(identifier)


def test_a_document_is_found_by_the_id_its_source_gave_it(tmp_path: Path) -> None:
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer")
    ids = [np.array([*tokenizer.encode(text).ids, 0], dtype=np.uint16) for text in ("one", "two")]
    batch = document_batch(ids, [b"one", b"two"], ["ENG1/0", "ENG1/1"])
    corpus = write_corpus(tmp_path / "corpus", {"train": batch}, vocab_size=257)
    found = Inspector.open(corpus, tmp_path / "tokenizer").find("ENG1/1")
    assert (found.text, found.origin["id"]) == ("two", "ENG1/1")


def test_a_sample_is_the_same_every_time(inspector: Inspector) -> None:
    first = [document.id for document in inspector.sample("train", 5)]
    assert len(set(first)) == 5
    assert [document.id for document in inspector.sample("train", 5)] == first
    assert len(inspector.sample("validation", 100)) == 3


def test_each_packing_is_reported_before_it_is_chosen(inspector: Inspector) -> None:
    reports = inspector.packing("train", 64)
    assert set(reports) == {"concat", "best_fit", "one_document"}
    assert reports["concat"].padding == 0
    assert reports["best_fit"].truncation < reports["concat"].truncation
    assert set(inspector.packing("validation", 64)) == {"best_fit", "one_document"}


def test_the_wrong_tokenizer_is_refused(inspector: Inspector, tmp_path: Path) -> None:
    other = write_byte_tokenizer(tmp_path / "other")
    other.add_tokens(["more"])
    other.save(str(tmp_path / "other/tokenizer.json"))
    with pytest.raises(ContractError, match="258 entries"):
        Inspector.open(tmp_path / "corpus", tmp_path / "other")
    with pytest.raises(ContractError, match="not a tokenizer"):
        Inspector.open(tmp_path / "corpus", tmp_path)
