"""Duplicates against `datasketch` as the oracle."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st
from rensa import RMinHash

from configs.schema.corpus import CorpusConfig, DedupConfig, NearConfig, SourceConfig
from pipelines.corpus.dedup import Duplicates, Fingerprints, band_keys, find_duplicates, unite
from pipelines.corpus.shards import write_batch
from pipelines.corpus.shingles import ngrams, word_hashes

NEAR = NearConfig()


def _sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(60, 200)))


WORDS = [f"{a}{b}" for a in "bcdfgklmnprst" for b in ("a", "e", "ing", "o", "ur", "y")]


def _variants(count: int, seed: int = 0) -> list[str]:
    """Texts of which some are copies of earlier ones with more or less changed."""
    draw = random.Random(seed)
    texts = [_sentence(draw)]
    while len(texts) < count:
        words = draw.choice(texts).split()
        changed = draw.choice([0, 0.005, 0.02, 0.05, 0.2, 1])
        texts.append(" ".join(draw.choice(WORDS) if draw.random() < changed else word for word in words))
    return texts


def _find(spans: Sequence[Sequence[str]], config: DedupConfig, folder: Path) -> Duplicates:
    folder.mkdir(exist_ok=True)
    files = []
    for number, texts in enumerate(spans):
        fingerprints = Fingerprints(config)
        for row, text in enumerate(texts):
            fingerprints.add(text.encode(), "train" if row % 3 else "validation")
        files.append(folder / f"{number}.arrow")
        write_batch(files[-1], fingerprints.batch())
    return find_duplicates(files, [len(texts) for texts in spans], config)


def _grams(text: str) -> np.ndarray:
    return ngrams(word_hashes(text.encode()), NEAR.words)


def test_pairs_in_a_band_are_those_datasketch_finds_among_the_same_signatures() -> None:
    texts = _variants(120)
    grams = [_grams(text) for text in texts]
    offsets = np.cumsum([0, *map(len, grams)], dtype=np.uint64)
    size = NEAR.bands * NEAR.rows
    signatures = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(grams), offsets, size, 1).to_rows()
    index = MinHashLSH(num_perm=size, params=(NEAR.bands, NEAR.rows))
    hashes = [
        MinHash(num_perm=size, hashvalues=np.array(row, dtype=np.uint64), scheme="affine32") for row in signatures
    ]
    for number, minhash in enumerate(hashes):
        index.insert(number, minhash)
    expected = {(a, b) for a, minhash in enumerate(hashes) for b in index.query(minhash) if a < b}
    keys = band_keys(grams, NEAR)
    found = {(a, b) for a, b in combinations(range(len(texts)), 2) if (keys[a] == keys[b]).any()}
    assert found == expected
    assert len(found) > 30


def test_pairs_are_found_about_as_often_as_datasketch_finds_them() -> None:
    """Where the likeness leaves no doubt, always or never."""
    texts = _variants(150, seed=1)
    grams = [_grams(text) for text in texts]
    index = MinHashLSH(num_perm=NEAR.bands * NEAR.rows, params=(NEAR.bands, NEAR.rows))
    oracle = []
    for number, values in enumerate(grams):
        minhash = MinHash(num_perm=NEAR.bands * NEAR.rows)
        minhash.update_batch([value.tobytes() for value in values])
        oracle.append(minhash)
        index.insert(number, minhash)
    keys = band_keys(grams, NEAR)
    theirs = ours = 0
    for a, b in combinations(range(len(texts)), 2):
        one, other = set(grams[a].tolist()), set(grams[b].tolist())
        likeness = len(one & other) / len(one | other)
        same = bool((keys[a] == keys[b]).any())
        assert same or likeness < 0.95
        assert not same or likeness > 0.25
        ours += same
        theirs += b in index.query(oracle[a])
    assert theirs > 100
    assert 0.9 < ours / theirs < 1.1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_first_of_each_set_stays_however_the_documents_are_cut_into_spans(tmp_path: Path) -> None:
    texts = ["", "short", "Short!", "short", *_variants(60, seed=2)]
    config = DedupConfig(near=NEAR)
    whole = _find([texts], config, tmp_path / "whole")
    cut = _find([texts[:1], [], texts[1:7], texts[7:40], texts[40:]], config, tmp_path / "cut")
    dust = _find([span for text in texts for span in ([text], [], [])], config, tmp_path / "dust")
    for name in ("dropped", "kept", "exact"):
        assert np.array_equal(getattr(whole, name), getattr(cut, name))
        assert np.array_equal(getattr(whole, name), getattr(dust, name))
    assert np.array_equal(cut.of_span(7, 33), whole.dropped[(whole.dropped >= 7) & (whole.dropped < 40)] - 7)

    first = {text: number for number, text in reversed(list(enumerate(texts)))}
    exact = {number for number, text in enumerate(texts) if first[text] < number}
    assert set(whole.dropped[whole.exact].tolist()) == exact
    assert {2, 3} <= set(whole.dropped.tolist())
    assert (whole.kept < whole.dropped).all()
    assert not set(whole.kept.tolist()) & set(whole.dropped.tolist())
    assert len(texts) - len(whole.dropped) < 40
    kept, size = whole.largest(1)[0]
    assert size == (whole.kept == kept).sum() + 1 == max(n for _, n in whole.largest(9))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_only_equal_texts_are_dropped_without_near(tmp_path: Path) -> None:
    texts = ["a b c", "a  b c", "a b c", "d", "a b c"]
    found = _find([texts[:2], texts[2:]], DedupConfig(), tmp_path)
    assert found.dropped.tolist() == [2, 4]
    assert found.kept.tolist() == [0, 0]
    assert found.exact.all()
    assert _find([["a", "b"]], DedupConfig(), tmp_path).dropped.tolist() == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
@settings(deadline=None)
def test_uniting_gives_the_lowest_of_each_connected_set(pairs: list[tuple[int, int]]) -> None:
    parent = {p: p for pair in pairs for p in pair}

    def root(x: int) -> int:
        return x if parent[x] == x else root(parent[x])

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    expected = {x: root(x) for x in sorted(parent) if root(x) != x}
    dropped, kept = unite(np.array(pairs, dtype=np.int64).reshape(-1, 2))
    assert dict(zip(dropped.tolist(), kept.tolist(), strict=True)) == expected


def test_documents_without_words_are_duplicates_only_if_they_are_equal() -> None:
    fingerprints = Fingerprints(DedupConfig(exact=False, near=NEAR))
    for text in ("...", "???", "...", "a", "A"):
        fingerprints.add(text.encode(), "train")
    batch = fingerprints.batch()
    by_row = dict(zip(batch.column("band0.row").to_pylist(), batch.column("band0.key0").to_pylist(), strict=True))
    assert by_row[0] == by_row[2] != by_row[1]
    assert by_row[3] == by_row[4]


def test_real_documents_with_a_few_words_changed_are_found() -> None:
    path = Path(__file__).parents[4] / "shared/data/peps/peps.tar.gz"
    if not path.is_file():
        pytest.skip(f"no documents at {path}")
    with tarfile.open(path) as archive:
        files = [member for member in archive if member.isfile()][:40]
        texts = [archive.extractfile(member).read().decode() for member in files]
    changed = [text.replace("the PEP", "this proposal", 3) + "\nUpdated since.\n" for text in texts]
    keys = band_keys([_grams(text) for text in [*texts, *changed]], NEAR)
    same = (keys[:40, None] == keys[None, 40:]).any(axis=2)
    assert same.diagonal().mean() > 0.9
    assert same.sum() - same.diagonal().sum() <= 2


def test_off_in_a_recipe_is_no_deduplication_and_a_setting_that_finds_nothing_is_refused() -> None:
    source = SourceConfig(path="x")
    for off in (False, "off", None):
        assert CorpusConfig(tokenizer="tokenizer", source=source, dedup=off).dedup is None
    assert CorpusConfig.model_validate(
        {"tokenizer": "tokenizer", "source": {"path": "x"}, "dedup": {"near": {}}}
    ).dedup == DedupConfig(near=NEAR)
    with pytest.raises(ValueError, match="finds nothing"):
        DedupConfig(exact=False)
