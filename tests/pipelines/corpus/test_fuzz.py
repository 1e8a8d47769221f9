"""Naughty strings and random bytes through every reader, format and compression: every record is accounted for, nothing
else is raised, and every token gives back its bytes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_files import COMPRESSIONS, FORMATS, RAW, TEXTS, jsonl, read
from tokenizers import Tokenizer

from actors.detokenizer import token_bytes
from actors.store.artifacts import Artifact
from configs.schema.corpus import (
    CleaningConfig,
    CorpusConfig,
    FieldsConfig,
    FiltersConfig,
    LanguageConfig,
    SourceConfig,
    SplitConfig,
)
from pipelines.corpus.account import Account
from pipelines.corpus.encode import Encoder
from pipelines.corpus.inspect import Inspector
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.tokenizer import SPECIAL_TOKENS
from pipelines.stage import StageContext
from pipelines.stages.corpus import CorpusStage

DATA = Path(os.environ.get("GANYMEDE_DATA", Path(__file__).parents[4] / "shared/data"))
EVERYTHING: dict[str, Any] = {
    "cleaning": CleaningConfig(html=True, mask=("email", "ip", "key")),
    "filters": FiltersConfig(
        language=LanguageConfig(keep=("en", "und")), rules=("gopher_quality", "gopher_repetition", "c4", "fineweb"),
        min_bytes=2,
    ),
    "fields": FieldsConfig(id="n", source="n", label="text"),
}  # fmt: skip
KINDS = ["text", "lines", "paragraphs", "jsonl", "csv", "tsv", "parquet", "arrow"]


@pytest.fixture(scope="module")
def naughty() -> list[str]:
    path = DATA / "blns/blns.json"
    if not path.is_file():
        pytest.skip(f"no naughty strings at {path}; set GANYMEDE_DATA")
    strings: list[str] = json.loads(path.read_text(encoding="utf-8"))
    assert len(strings) > 400
    return strings


def _records(ledger: Ledger) -> int:
    """Everything that was read, as the report counts it."""
    account = Account()
    account.add(Ledger.model_validate_json(ledger.model_dump_json()))
    return account.records


def _blank(line: str) -> bool:
    return not line.encode().strip()


def _tsv(texts: list[str]) -> bytes:
    return "".join(["n\ttext\n", *(f"{n}\t{text}\n" for n, text in enumerate(texts))]).encode()


def _lines(texts: list[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def _paragraphs(texts: list[str]) -> bytes:
    return "".join(f"{text}\n\n" for text in texts).encode()


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", FORMATS)
def test_naughty_strings_come_back_from_records(
    tmp_path: Path, naughty: list[str], ending: str, compression: str
) -> None:
    (tmp_path / f"a.{ending}{compression}").write_bytes(COMPRESSIONS[compression](FORMATS[ending](naughty)))
    found, ledger = read(tmp_path, 5000)
    assert [text for _, text in found] == [text for text in naughty if text]
    assert (ledger.empty, ledger.rejected) == (naughty.count(""), [])
    if ending == "jsonl":  # the other files come in blocks of two, which takes the filters long
        found, ledger = read(tmp_path, 50_000, **EVERYTHING)
        assert _records(ledger) == len(naughty)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("kind", "write"), [("lines", _lines), ("paragraphs", _paragraphs), ("tsv", _tsv)])
def test_naughty_strings_come_back_from_lines(
    tmp_path: Path, naughty: list[str], kind: str, write: Callable[[list[str]], bytes], compression: str
) -> None:
    """Those that one line can hold."""
    strings = [s for s in naughty if not _blank(s) and not set(s) & set("\r\n\t") and not s.startswith("\ufeff")]
    (tmp_path / f"a{compression}").write_bytes(COMPRESSIONS[compression](write(strings)))
    found, ledger = read(tmp_path, 300, format=kind)
    assert [text for _, text in found] == strings
    assert ledger.rejected == []
    _, ledger = read(tmp_path, 50_000, format=kind, **EVERYTHING)
    assert _records(ledger) == len(strings)


def test_naughty_strings_come_back_from_files(tmp_path: Path, naughty: list[str]) -> None:
    for number, text in enumerate(naughty):
        (tmp_path / f"{number:04}.txt").write_bytes(text.encode())
    found, ledger = read(tmp_path, 500)
    assert [text for _, text in found] == [text for text in naughty if text]
    assert _records(ledger) == len(naughty)


def test_naughty_strings_come_back_from_messages(tmp_path: Path, naughty: list[str]) -> None:
    chats = [{"turns": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]} for text in naughty]
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps(chat).encode() + b"\n" for chat in chats))
    found, ledger = read(tmp_path, 500, fields=FieldsConfig(messages="turns"))
    assert [text for _, text in found] == [f"{text}\n\nx" if text else "x" for text in naughty]
    assert ledger.rejected == []


def test_naughty_strings_are_names_of_sources(tmp_path: Path, naughty: list[str]) -> None:
    rows = [{"text": "text", "from": name} for name in naughty]
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    _, ledger = read(tmp_path, fields=FieldsConfig(source="from"))
    assert {name or "(none)" for name in naughty} == set(ledger.by_source)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_bytes_never_stop_a_reader(tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any) -> None:
    """Random bytes, whole files with some bytes changed or cut off, before they were compressed or after."""
    compression = data.draw(st.sampled_from(list(COMPRESSIONS)))
    plain = data.draw(st.one_of(st.just(FORMATS.get(kind, jsonl)(TEXTS)), st.binary(max_size=300)))
    content = _damaged(COMPRESSIONS[compression](_damaged(plain, data)), data)
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / f"f{compression}").write_bytes(content)
    fields = [EVERYTHING["fields"], FieldsConfig()]
    if kind in ("jsonl", "parquet", "arrow"):
        fields.append(FieldsConfig(messages="text"))
    config = {**EVERYTHING, "fields": data.draw(st.sampled_from(fields))}
    if config["fields"].messages is not None or data.draw(st.booleans()):
        config["filters"] = FiltersConfig()
    found, ledger = read(folder, data.draw(st.integers(1, 400)), format=kind, **config)
    dropped = sum(sum(counts.drops.values()) for counts in ledger.by_source.values())
    assert _records(ledger) == len(found) + ledger.empty + len(ledger.rejected) + dropped
    assert all(r.name == f"f{compression}" and r.offset >= 0 and r.reason for r in ledger.rejected)


def _damaged(content: bytes, data: Any) -> bytes:
    if not content or not data.draw(st.booleans()):
        return content
    changed = bytearray(content)
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(changed) - 1), st.integers(0, 255)), max_size=8)
    ):
        changed[place] = byte
    return bytes(changed[: data.draw(st.integers(0, len(changed)))] if data.draw(st.booleans()) else changed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(["role", "content"]), children),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=6), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_json_is_a_document_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], chats: bool
) -> None:
    folder = tmp_path_factory.mktemp("json")
    lines = [json.dumps({"value": value}) for value in values]
    (folder / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    fields = FieldsConfig(messages="value") if chats else FieldsConfig(text="value", source="value")
    found, ledger = read(folder, 20, fields=fields)
    assert len(found) + ledger.empty + len(ledger.rejected) == len(values)


def test_every_token_gives_back_its_bytes(tokenizer: Artifact) -> None:
    opened = Tokenizer.from_file(str(tokenizer.path / "tokenizer.json"))
    table = token_bytes(opened)
    assert table is not None
    encoder = Encoder.load(tokenizer.path, "gigatoken")
    ordinary = {token: content for token, content in table.items() if token >= len(SPECIAL_TOKENS)}
    assert sorted(content for content in ordinary.values() if len(content) == 1) == [bytes([b]) for b in range(256)]
    texts = 0
    for token, content in ordinary.items():
        try:
            text = content.decode()
        except UnicodeDecodeError:
            assert "\ufffd" in opened.decode([token])
            continue
        texts += 1
        assert opened.decode([token]) == text
        assert b"".join(table[i] for i in encoder.encode(text).tolist()) == content
    assert texts > 300


def test_every_character_is_the_bytes_of_its_tokens(tokenizer: Artifact) -> None:
    """One of each 61 of all planes: every lead byte, every continuation byte."""
    opened = Tokenizer.from_file(str(tokenizer.path / "tokenizer.json"))
    table = token_bytes(opened)
    assert table is not None
    encoder = Encoder.load(tokenizer.path, "gigatoken")
    characters = [chr(c) for c in range(0, 0x110000, 61) if not 0xD800 <= c < 0xE000]
    for begin in range(0, len(characters), 500):
        text = "".join(characters[begin : begin + 500])
        ids = encoder.encode(text).tolist()
        assert b"".join(table[i] for i in ids) == text.encode()
        assert opened.decode(ids, skip_special_tokens=False) == text
        assert encoder.agrees(text)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_naughty_strings_come_back_from_a_corpus(
    tmp_path: Path, naughty: list[str], tokenizer: Artifact, make_context: Callable[[str], StageContext]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(naughty))
    config = CorpusConfig(
        tokenizer="tokenizer", source=SourceConfig(path=str(tmp_path / "a.jsonl"), cleaning=RAW),
        split=SplitConfig(validation_fraction=0.3),
    )  # fmt: skip
    context = make_context("naughty")
    CorpusStage().run(config, {"tokenizer": tokenizer}, context)
    inspector = Inspector.open(context.out, tokenizer.path)
    found = [
        inspector.document(split, number).text
        for split, record in inspector.index.splits.items()
        for number in range(record.documents)
    ]
    assert sorted(found) == sorted(text for text in naughty if text)
