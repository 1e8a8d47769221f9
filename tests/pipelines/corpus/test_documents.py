"""Every reader gives every record once, wherever the file is cut, and says what it could not read."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs
from source_files import COMPRESSIONS, FORMATS, TEXTS, arrow, jsonl, parquet, read

from configs.errors import DataError
from configs.schema.corpus import FieldsConfig, FiltersConfig, SourceConfig
from pipelines.corpus.account import Account
from pipelines.corpus.documents import read_documents, sample_texts
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.pieces import LARGEST_SPAN_BYTES, SMALLEST_SPAN_BYTES, choose_span_bytes, plan_spans
from pipelines.corpus.sources import list_source


def _texts(path: Path, span_bytes: int = 1 << 20, **config: Any) -> list[str]:
    return [text for _, text in read(path, span_bytes, **config)[0]]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_its_documents(tmp_path: Path, ending: str, compression: str) -> None:
    name = f"data.{ending}{compression}"
    (tmp_path / name).write_bytes(COMPRESSIONS[compression](FORMATS[ending](TEXTS)))
    found, ledger = read(tmp_path)
    assert [text for _, text in found] == [t for t in TEXTS if t]
    assert (ledger.empty, ledger.rejected) == (1, [])
    assert len({n for n, _ in found}) == len(found)
    assert all(n.startswith(f"{name}:") for n, _ in found)


def test_tables_without_quotes_and_without_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'text\tlabel\nsay "hi\t1\r\nbye\t0\n')
    (tmp_path / "b.tsv").write_bytes(b"x\ty\tz\n")
    found, _ = read(tmp_path, fields=FieldsConfig(label="label"))
    assert [t for _, t in found] == ['say "hi', "bye"]
    config = {"columns": ("text", "label"), "include": ("a.tsv",)}
    assert _texts(tmp_path, **config) == ["text", 'say "hi', "bye"]


def test_a_file_a_line_or_a_paragraph_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \t\nthree\n")
    assert read(tmp_path, format="text")[0] == [("a.txt", "\ufeffone\r\ntwo\n\n \t\nthree\n")]
    assert read(tmp_path, format="lines")[0] == [("a.txt:0", "one"), ("a.txt:8", "two"), ("a.txt:16", "three")]
    assert read(tmp_path, format="paragraphs")[0] == [("a.txt:0", "one\r\ntwo"), ("a.txt:16", "three")]


lines = st.lists(st.sampled_from([b"a", b"bb\r", b"", b" ", b"\xc3\xa9" * 9, b"c" * 40]), max_size=30)


@given(lines, st.booleans(), st.integers(1, 60), st.sampled_from(["lines", "paragraphs", "jsonl", "tsv"]))
@settings(max_examples=150, deadline=None)
def test_a_file_cut_anywhere_gives_every_record_once(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], ended: bool, span_bytes: int, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    if kind == "jsonl":
        content = [json.dumps({"text": c.decode() + "."}).encode() if c.strip() else c for c in content]
    elif kind == "tsv":
        content = [b"n\ttext", *(b"1\t" + c for c in content)]
    (folder / "f").write_bytes(b"\n".join(content) + b"\n" * ended)
    whole, cut = read(folder, format=kind), read(folder, span_bytes, format=kind)
    assert cut[0] == whole[0]
    assert cut[1] == whole[1]
    if kind == "lines":
        assert [t for _, t in whole[0]] == [c.removesuffix(b"\r").decode() for c in content if c.strip()]


def test_row_groups_are_spread_over_spans(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS))
    source = SourceConfig(path=str(tmp_path))
    listing = list_source(source)
    assert len(plan_spans(listing, source, 1)) == 3
    assert read(tmp_path, 1) == read(tmp_path)


@given(st.integers(0, 1 << 44))
def test_spans_follow_from_the_size_alone(size: int) -> None:
    span = choose_span_bytes(size)
    assert SMALLEST_SPAN_BYTES <= span <= LARGEST_SPAN_BYTES
    assert choose_span_bytes(1 << 40) == LARGEST_SPAN_BYTES
    assert 20 <= 100_000_000 // choose_span_bytes(100_000_000) <= 100


def test_small_files_are_gathered(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"{n:03}.txt").write_text(f"file {n}")
    source = SourceConfig(path=str(tmp_path))
    spans = plan_spans(list_source(source), source, 200)
    assert 3 < len(spans) < 8
    assert _texts(tmp_path, 200) == [f"file {n}" for n in range(100)]


def test_broken_records_are_named_with_place_and_reason(tmp_path: Path) -> None:
    rows = [b'{"text": "good"}', b'{"text": "cut', b"[1]", b'{"text": 3}', b'{"other": 1}', b'{"text": "\xff"}',
            b'{"text": "\\ud800"}', b'{"text": null}', b'{"text": "last"}']  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    found, ledger = read(tmp_path)
    assert [t for _, t in found] == ["good", "last"]
    offsets = [sum(len(r) + 1 for r in rows[:n]) for n in range(1, 8)]
    assert [r.offset for r in ledger.rejected] == offsets
    assert {r.name for r in ledger.rejected} == {"a.jsonl"}
    reasons = [r.reason for r in ledger.rejected]
    assert "not JSON" in reasons[0]
    assert reasons[1:4] == ["not an object but list", "field 'text' holds int, not text", "no field 'text'"]


def test_broken_rows_of_csv_cost_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,ok\n2,"bad"quote\n3,a,b\n4,caf\xe9\n5,fine\n6,"open')
    found, ledger = read(tmp_path)
    assert [t for _, t in found] == ["ok", "fine"]
    assert sorted(r.offset for r in ledger.rejected) == [13, 26, 32, 46]


@pytest.mark.parametrize("ending", ["jsonl.gz", "csv.gz", "txt.gz", "jsonl.zst", "parquet", "parquet.gz", "arrow"])
def test_a_file_that_breaks_off_keeps_what_came_before(tmp_path: Path, ending: str) -> None:
    texts = [os.urandom(300).hex() for _ in range(2000)]
    kind = ending.split(".")[0]
    content = "\n".join(texts).encode() if kind == "txt" else FORMATS[kind](texts)
    if ending.endswith("gz"):
        content = gzip.compress(content)
    elif ending.endswith("zst"):
        content = pa.Codec("zstd").compress(content).to_pybytes()
    (tmp_path / f"cut.{ending}").write_bytes(content[: len(content) * 3 // 4])
    found, ledger = read(tmp_path)
    assert [t for _, t in found] == texts[: len(found)]
    assert [(r.name, r.rest) for r in ledger.rejected] == [(f"cut.{ending}", True)]
    if kind in ("jsonl", "csv"):
        assert len(found) > 500
    account = Account()
    account.add(ledger)
    with pytest.raises(DataError, match=r"1 of 1 files break off; the first is cut"):
        account.check(1, SourceConfig(path=".", max_bad_fraction=0.01))
    account.check(1, SourceConfig(path=".", max_bad_fraction=1))


def test_ids_sources_and_labels_come_along(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "t", "key": 7, "where": "web"}\n{"text": "u", "key": "k"}\n')
    source = SourceConfig(path=str(tmp_path), fields=FieldsConfig(id="key", source="where"))
    listing = list_source(source)
    (span,) = plan_spans(listing, source, 1 << 20)
    (documents,) = read_documents(listing, span, source, Ledger())
    assert (documents.ids, documents.sources, documents.labels) == (["7", "k"], ["web", None], [])


def test_globs_and_uris_name_the_same_data(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "x/b.jsonl", "y/c.jsonl", "y/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    plain = list_source(SourceConfig(path=str(tmp_path)))
    assert list_source(SourceConfig(path=tmp_path.as_uri())).digest == plain.digest
    names = [f.name for f in list_source(SourceConfig(path=f"{tmp_path}/*/*.jsonl")).files]
    assert names == ["x/a.jsonl", "x/b.jsonl", "y/c.jsonl"]
    assert [f.name for f in list_source(SourceConfig(path=f"{tmp_path}/x/*")).files] == ["a.jsonl", "b.jsonl"]


def test_any_pyarrow_file_system_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket/sub").mkdir(parents=True)
    (tmp_path / "bucket/sub/a.jsonl").write_bytes(jsonl(TEXTS))
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())

    class Addresses:
        @staticmethod
        def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
            return store, uri.removeprefix("test://")

    monkeypatch.setattr("pyarrow.fs.FileSystem", Addresses)
    source = SourceConfig(path="test://bucket")
    listing = list_source(source)
    assert listing.digest == list_source(SourceConfig(path=str(tmp_path / "bucket"))).digest
    texts = list(sample_texts(listing, source, "s", 1 << 20, Ledger()))
    assert len(texts) == 5


def test_a_saved_dataset_gives_its_rows_alone(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "data-00000-of-00001.arrow").write_bytes(arrow(TEXTS, pa.ipc.new_stream))
    (folder / "cache-1234.arrow").write_bytes(arrow(["cached"], pa.ipc.new_stream))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert _texts(tmp_path) == _texts(folder) == [t for t in TEXTS if t]


def test_a_hub_name_without_a_connection_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="offline"):
        list_source(SourceConfig(path="hf://datasets/owner/name"))


def test_dropped_documents_are_counted_with_examples_that_do_not_depend_on_spans(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"short {n}" for n in range(50)] + ["long enough to stay"]))
    filters = FiltersConfig(min_bytes=10)
    summaries = []
    for span_bytes in (100, 1 << 20):
        source = SourceConfig(path=str(tmp_path), filters=filters)
        listing = list_source(source)
        account = Account()
        for span in plan_spans(listing, source, span_bytes):
            ledger = Ledger()
            list(read_documents(listing, span, source, ledger))
            account.add(Ledger.model_validate_json(ledger.model_dump_json()))
        summaries.append(account.summary())
    assert summaries[0] == summaries[1]
    assert (summaries[0]["records"], summaries[0]["documents"], summaries[0]["drops"]) == (51, 1, {"too_short": 50})
    assert len(summaries[0]["examples"]["too_short"]) == 3
