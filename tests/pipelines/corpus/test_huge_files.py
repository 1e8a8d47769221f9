"""Files far larger than a worker's memory: spread over spans, read within bounds, the same documents for any cut."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from configs.errors import DataError
from configs.schema.corpus import SourceConfig
from pipelines.corpus import lines, streams
from pipelines.corpus.account import Account
from pipelines.corpus.blocks import Block
from pipelines.corpus.documents import read_documents
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.lines import LINE_READERS
from pipelines.corpus.pieces import choose_span_bytes, plan_spans
from pipelines.corpus.sources import Listing, Rejected, SourceFile, list_source
from pipelines.corpus.streams import MAX_RECORD_BYTES, Stream

HUGE = 50 << 30


@pytest.mark.parametrize("kind", ["lines", "paragraphs", "jsonl", "tsv"])
def test_one_file_of_50_gigabytes_is_work_for_many_workers(kind: str) -> None:
    listing = Listing(fs.LocalFileSystem(), "/data", (SourceFile("huge.txt", HUGE, "00"),))
    spans = plan_spans(listing, SourceConfig(path="/data", format=kind), choose_span_bytes(HUGE))
    assert len(spans) > 500
    pieces = [piece for span in spans for piece in span]
    assert [p.begin for p in pieces[1:]] == [p.end for p in pieces[:-1]]
    assert (pieces[0].begin, pieces[-1].end) == (0, HUGE)
    assert max(p.size_bytes for p in pieces) <= 256 << 20


def test_a_file_that_is_one_document_has_a_limit_that_is_said_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(MAX_RECORD_BYTES + 1)
    source = SourceConfig(path=str(tmp_path))
    listing = list_source(source)
    (span,) = plan_spans(listing, source, 1 << 20)
    account, ledger = Account(), Ledger()
    assert list(read_documents(listing, span, source, ledger)) == []
    account.add(ledger)
    with pytest.raises(DataError, match=r"set source\.format to lines or paragraphs"):
        account.check(1, source)


class _Counting:
    """A file of 200 GB whose bytes all are `x`, but those that `known` says."""

    def __init__(self, known: dict[int, bytes]) -> None:
        self._known = known
        self._place = 0
        self.bytes_read = 0
        self.closed = False

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        assert whence == 0
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        content = bytearray(b"x" * size)
        for place, value in self._known.items():
            if self._place <= place < self._place + size:
                content[place - self._place : place - self._place + len(value)] = value
        self._place += size
        self.bytes_read += size
        return bytes(content)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("kind", ["lines", "paragraphs", "jsonl"])
def test_a_span_inside_an_endless_record_reads_at_most_a_record_beyond_itself(kind: str) -> None:
    """200 GB without a line end would otherwise be read to the end by every span."""
    counting = _Counting({})
    span = 8 << 20
    found = list(
        LINE_READERS[kind](Stream(pa.PythonFile(counting, mode="r"), None), "f", span, 2 * span, SourceConfig(path="."))
    )
    assert [f for f in found if isinstance(f, Rejected) or f.positions] == []
    assert counting.bytes_read <= 2 * span + MAX_RECORD_BYTES


@pytest.mark.parametrize("kind", ["lines", "paragraphs", "jsonl"])
def test_the_span_an_endless_record_begins_in_rejects_it_at_the_limit(kind: str) -> None:
    counting = _Counting({10: b"\n\n{"})
    found = LINE_READERS[kind](
        Stream(pa.PythonFile(counting, mode="r"), None), "f", 11, 1 << 20, SourceConfig(path=".")
    )
    rejected = [f for f in found if isinstance(f, Rejected)]
    assert [(r.offset, "more than" in r.reason) for r in rejected] == [(12, True)]
    assert counting.bytes_read < 2 * MAX_RECORD_BYTES


@pytest.fixture(scope="module")
def small_limits() -> Iterator[None]:
    """Records of at most 40 bytes, read 7 at a time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (streams, lines):
            patch.setattr(module, "MAX_RECORD_BYTES", 40)
            patch.setattr(module, "CHUNK_BYTES", 7)
        yield


content = st.lists(
    st.sampled_from(
        [b"a", b"\r\n", b"\n", b"bb\r\n", b"\n\n", b"\r\n\r\n", b" \t\r\n", b"c" * 13, b"d" * 41, b"\xc3\xa9"]
    ),
    max_size=30,
).map(b"".join)


@given(content, st.integers(1, 60), st.sampled_from(["lines", "paragraphs"]))
@settings(max_examples=400, deadline=None)
@pytest.mark.usefixtures("small_limits")
def test_borders_of_spans_and_chunks_change_nothing(content: bytes, span_bytes: int, kind: str) -> None:
    """Line ends of both kinds, blank lines on borders, records at the limit."""

    def read(begin: int, end: int | None) -> list[Any]:
        stream = Stream(pa.BufferReader(content), None)
        found: list[Any] = []
        for block in LINE_READERS[kind](stream, "f", begin, end, SourceConfig(path=".")):
            if isinstance(block, Block):
                found.extend(zip(block.positions, block.texts, strict=True))
            else:
                found.append((block.offset, block.reason))
        return sorted(found)

    cuts = [*range(0, len(content), span_bytes), len(content)]
    whole = read(0, None)
    assert [found for begin, end in pairwise(cuts) for found in read(begin, end)] == whole
    if kind == "paragraphs" and not any("more than" in text for _, text in whole):
        parts = re.split(rb"\n(?:[ \t]*\n)+", b"\n" + content.replace(b"\r\n", b"\n") + b"\n")
        expected = [part.strip(b"\n").decode() for part in parts if part.strip()]
        assert [text.replace("\r\n", "\n") for _, text in whole] == expected
