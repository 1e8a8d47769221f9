import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema.corpus import CleaningConfig
from pipelines.corpus.clean import clean, is_code, steps
from pipelines.corpus.html import visible_text
from pipelines.corpus.masks import mask_addresses, mask_emails, mask_keys


def _clean(text: str, name: str = "a.txt", **config: object) -> tuple[str, list[str]]:
    content, changed = clean(text.encode(), steps(CleaningConfig(**config), name))  # type: ignore[arg-type]
    return content.decode(), changed


@pytest.mark.parametrize(
    ("text", "after", "step"),
    [
        ("caf\u00c3\u00a9 is good", "café is good", "mojibake"),
        ("\u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d", "“quoted”", "mojibake"),
        ("e\u0301", "é", "nfc"),
        ("\u212b and \u2000", "Å and \u2002", "nfc"),
        ("a\r\nb\rc\x00\x0cd\ufeff", "a\nb\nc\nd", "controls"),
        ("£\u0085z", "£\nz", "controls"),
    ],
)
def test_prose_is_brought_to_one_form(text: str, after: str, step: str) -> None:
    assert _clean(text) == (after, [step])
    assert _clean(text, name="a.py") == (text, [])
    assert _clean(text, normalize="none", mojibake=False, controls=False) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "plain\ttext\n",
        "Ænima, naïve, Ñandú",
        "\u201cquotes\u201d \u2013 \u2018too\u2019\u2026 € £5",
        "日本語 한국어 العربية",
    ],
)
def test_good_text_stays_as_it_is(text: str) -> None:
    assert _clean(text) == (text, [])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_cheap_tests_miss_nothing(text: str) -> None:
    after, _ = _clean(text, mojibake=False)
    assert unicodedata.is_normalized("NFC", after)
    assert not any((unicodedata.category(c) == "Cc" and c not in "\t\n") or c == "\ufeff" for c in after)
    assert _clean(after, mojibake=False) == (after, [])


def test_source_code_is_known_by_its_ending() -> None:
    assert [is_code(n) for n in ("a.py", "x/b.CPP", "c.rs.gz", "d.txt", "py", "e.jsonl")] == [True] * 3 + [False] * 3


def test_html_gives_what_a_reader_sees() -> None:
    page = """<html><head><title>No</title><style>p {}</style></head><body><h1>Title</h1>
    <p>One &amp; two<br>three <b>bold</b></p><script>if (a < b) x();</script><ul><li>item</li></ul></body></html>"""
    assert visible_text(page).split("\n") == ["Title", "", "One & two", "three bold", "", "item"]
    assert visible_text("no tags at all") == "no tags at all"
    assert _clean("<p>caf&eacute;</p>", html=True) == ("café", ["html"])


@given(st.text())
def test_html_of_any_text_is_text(text: str) -> None:
    assert isinstance(visible_text("<![" + text), str)
    assert isinstance(visible_text("<div>" + text + "</script>"), str)


def test_personal_and_secret_data_is_masked() -> None:
    assert mask_emails("write to jane.doe+x@mail.example.org, not a@b") == "write to <email>, not a@b"
    assert mask_addresses("8.8.8.8 and 127.0.0.1, v1.2.3.4.5, 999.1.1.1") == "<ip> and 127.0.0.1, v1.2.3.4.5, 999.1.1.1"
    assert mask_addresses("2001:4860:4860::8888 at 12:30:45") == "<ip> at 12:30:45"
    assert mask_keys(f"AKIA{'A1' * 8} gh{'p'}_{'x' * 36} skill") == "<key> <key> skill"
    assert _clean("mail a@example.com", name="a.py", mask=("email",)) == ("mail <email>", ["mask_email"])
