import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.shingles import ngrams, split_words, word_hashes

GOLDEN = 13803072389558038086
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@given(TEXTS, TEXTS)
@settings(max_examples=400, deadline=None)
def test_words_have_equal_hashes_if_and_only_if_they_are_equal(one: str, other: str) -> None:
    words = split_words(one) + split_words(other)
    hashes = [*word_hashes(one.encode()).tolist(), *word_hashes(other.encode()).tolist()]
    assert len(words) == len(hashes)
    assert len(set(words)) == len(set(hashes)) == len(set(zip(words, hashes, strict=True)))


def test_what_is_between_words_and_the_case_do_not_count() -> None:
    plain = word_hashes(b"the cat sat on the mat")
    for same in ("The cat -- sat\non the MAT.", "“The” cat… sat on—the mat", "(the)cat;sat,on the   mat"):
        assert np.array_equal(word_hashes(same.encode()), plain)


def test_a_text_hashed_in_pieces_has_the_same_words() -> None:
    words = [f"w{number}é" for number in range(60_000)] + ["x" * 300_000, "y"]
    hashes = word_hashes(" ".join(words).encode())
    assert len(hashes) == len(words)
    assert hashes[[0, 59_999, 60_001]].tolist() == [word_hashes(words[i].encode())[0] for i in (0, 59_999, 60_001)]


def test_the_order_of_words_counts_in_ngrams() -> None:
    words = word_hashes(b"a b c a b c b a")
    grams = ngrams(words, 3).tolist()
    assert len(grams) == 6
    assert grams[0] == grams[3]
    assert len(set(grams)) == 5
    assert ngrams(words, 9).tolist() == []


def test_hashes_are_the_same_in_every_process() -> None:
    """Values of the first release: fingerprints that people keep stay good."""
    assert ngrams(word_hashes("naïve words in a row".encode()), 5).tolist() == [GOLDEN]
