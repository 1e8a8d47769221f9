from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema.corpus import FiltersConfig
from pipelines.corpus.filters import Filters, Texts, _cover, _ngrams

PROSE = (
    "The ship had left the harbour long before anyone thought to be worried about the captain. "
    "People stood on the pier and looked out to the grey water, where nothing was to be seen.\n"
    "Some of them said that they have never known a winter with so much ice, and went home to light a fire. "
    "Others waited until the lamps were lit, because hope is a stubborn guest in small towns.\n"
)


def _reasons(rule: str, *texts: str) -> list[str | None]:
    filters = Filters(FiltersConfig(rules=(rule,)))  # type: ignore[arg-type]
    return [reason for _, reason in filters.apply([text.encode() for text in texts])]


@pytest.mark.parametrize("rule", ["gopher_quality", "gopher_repetition", "c4", "fineweb"])
def test_prose_passes(rule: str) -> None:
    assert _reasons(rule, PROSE, PROSE.upper().lower()) == [None, None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the word and that is of few", "gopher_few_words"),
        ("the of a b c " * 30, "gopher_word_length"),
        ("#word these of and that " * 20, "gopher_hashes"),
        ("word... the of and that " * 20, "gopher_ellipses"),
        ("- the word of someone and that\n" * 20, "gopher_bullet_lines"),
        (
            ("the word of someone and that they have with others who are there " * 2 + "…\n") * 5,
            "gopher_ellipsis_lines",
        ),
        ("the 12345 67890 and 12345 " * 20, "gopher_letterless_words"),
        ("einige Worte ohne jedes englische Wort darin " * 10, "gopher_stop_words"),
    ],
)
def test_gopher_quality_names_the_rule(text: str, reason: str) -> None:
    assert _reasons("gopher_quality", PROSE, text, PROSE) == [None, reason, None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one line\nanother line\none line\n" + "one line\n" * 2, "gopher_repeated_lines"),
        ("\n".join([*(f"l{n}" for n in range(8)), *["a much longer line than all others"] * 3]),
         "gopher_repeated_line_characters"),
        ("a\nb\n\na\nb\n\na\nc\n\na\nb", "gopher_repeated_lines"),
        (PROSE + "harbour master " * 20, "gopher_top_2gram"),
        (PROSE + PROSE.replace("\n", " ", 1).replace("The", "That"), "gopher_repeated_5grams"),
    ],
)  # fmt: skip
def test_gopher_repetition_names_the_rule(text: str, reason: str) -> None:
    assert _reasons("gopher_repetition", PROSE, text, PROSE) == [None, reason, None]


def test_fineweb_names_the_rule() -> None:
    words = [f"w{n} and another bunch of words that make it long" for n in range(20)]
    assert _reasons("fineweb", "\n".join(words), ".\n".join(f"short {n}" for n in range(20)) + ".") == [
        "fineweb_line_ends",
        "fineweb_short_lines",
    ]
    assert _reasons(
        "fineweb", PROSE + PROSE, "\n".join("long-word-without-any-white-space-inside." * 2 for n in range(9))
    )[0] == ("fineweb_repeated_lines")


def test_c4_keeps_lines_of_prose() -> None:
    page = (
        f"Home | About\n{PROSE}Please enable javascript to see this page now.\n"
        "Read our privacy policy for more of this.\nCited[1] claims are found all over it.\n"
    )
    ((text, reason),) = Filters(FiltersConfig(rules=("c4",))).apply([page.encode()])
    assert reason is None
    assert text.decode() == PROSE + "Cited claims are found all over it."
    assert _reasons("c4", "Only one sentence is in here.", PROSE + "{", PROSE + "Lorem ipsum dolor.") == [
        "c4_few_sentences",
        "c4_curly_bracket",
        "c4_lorem_ipsum",
    ]


def _repeated_share(words: Sequence[str], n: int) -> float:
    """By hand: share of the characters in n-grams that occurred before."""
    seen, covered = set(), set()
    for begin in range(len(words) - n + 1):
        gram = tuple(words[begin : begin + n])
        if gram in seen:
            covered.update(range(begin, begin + n))
        seen.add(gram)
    return sum(len(words[n]) for n in covered) / max(sum(map(len, words)), 1)


@given(st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "é"]), max_size=40), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_repeated_ngrams_are_those_of_a_plain_count(documents: list[list[str]]) -> None:

    words = Texts([" ".join(d).encode() for d in documents]).words
    for n, (repeats, _) in enumerate(_ngrams(words, 10), 2):
        covered = words.sums(_cover(repeats, n) * words.chars)
        total = words.sums(words.chars)
        for document, part, whole in zip(documents, covered, total, strict=True):
            assert part == pytest.approx(_repeated_share(document, n) * whole)


@given(st.lists(st.text(max_size=60), max_size=12))
@settings(max_examples=60, deadline=None)
def test_what_happens_to_a_document_does_not_depend_on_its_neighbours(texts: list[str]) -> None:
    content = [t.encode(errors="replace") for t in texts]
    filters = Filters(FiltersConfig(rules=("c4", "fineweb", "gopher_repetition", "gopher_quality")))
    assert filters.apply(content) == [one for text in content for one in filters.apply([text])]
