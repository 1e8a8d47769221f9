import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema.corpus import CleaningConfig
from pipelines.corpus.clean import clean, is_code, looks_like_code, steps
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


def test_letters_become_lower_case_where_asked() -> None:
    assert _clean("Élan IN A.py", name="a.py", lowercase=True) == ("élan in a.py", ["lowercase"])


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


PROGRAMS = {
    "python": """\
    def test_keyencoding(self):
        d = {}
        key = 'P\u00c3\u00b6p'
        # the default keyencoding is utf-8
        shelve.Shelf(d)[key] = [1]
        self.assertIn(key.encode('utf-8'), d)
""",
    "python_test": """\
def test_encoding_infer(datapath):
    with pd.read_sas(fname, encoding="infer", iterator=True) as df1_reader:
        assert df1_reader.inferred_encoding == "cp1252", df1_reader.inferred_encoding
    assert "\u00c3\u00a9grtxt" in result.columns
""",
    "session": """\
    >>> fix_encoding("s\u00c3\u00b3")
    's\u00f3'
""",
    "javascript": """\
// what a broken header looks like
const broken = "caf\u00c3\u00a9";
if (decode(broken) !== "caf\u00e9") {
  throw new Error(broken);
}
""",
    "c": """\
static const char *names[] = {
    "F\u00c3\u00bcr", /* as it comes */
};
""",
}
PROSE = {
    '<p>"You must have gone by the Darren, I suppose"\u00e2\u20ac\u201dthat was all he said.': 'suppose"\u2014that was',
    "Kartoffelkuehen, a dark brown one, and R\u00c3\u00b6slein, the \u201cfavourite\u201d": "and R\u00f6slein",
    "'It is a report on the rationale of the world\u00e2\u20ac\u2122s largest study (see 2; below).'": "world\u2019s",
    '{"note": "caf\u00c3\u00a9"}\n' + "It was a long walk to the place, and nobody came.\n" * 20: "caf\u00e9",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_literals_of_program_source_in_records_are_left_alone(name: str) -> None:
    assert _clean(PROGRAMS[name], name="records.jsonl") == (PROGRAMS[name], [])


@pytest.mark.parametrize("text", PROSE)
def test_prose_that_was_decoded_wrongly_is_repaired_beside_sound_lines(text: str) -> None:
    after, changed = _clean(f"{text}\n\u201cSound\u201d line.", name="records.jsonl")
    assert PROSE[text] in after
    assert "\u201cSound\u201d" in after
    assert changed == ["mojibake"]


@given(st.text(st.sampled_from("ab \t(;={}\"'\n#/")))
def test_any_text_is_judged(text: str) -> None:
    assert isinstance(looks_like_code(text), bool)


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
