"""Source files of every format, and what is read from them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.schema.corpus import CleaningConfig, SourceConfig
from pipelines.corpus.documents import read_documents
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.pieces import plan_spans
from pipelines.corpus.sources import list_source

RAW = CleaningConfig(normalize="none", mojibake=False, controls=False)
TEXTS = ["first", "zweite Zeile: ä", "", 'with "quotes", commas\nand a line end', "日本語 🤖", "x" * 3000]


def read(path: Path, span_bytes: int = 1 << 20, **config: Any) -> tuple[list[tuple[str, str]], Ledger]:
    """Names and texts of a source's documents, span by span, and the account of the rest."""
    source = SourceConfig(path=str(path), **{"cleaning": RAW, **config})
    listing = list_source(source)
    ledger = Ledger()
    found = []
    for span in plan_spans(listing, source, span_bytes):
        for documents in read_documents(listing, span, source, ledger):
            texts = (text.decode() for text in documents.texts)
            found.extend(zip(documents.names, texts, strict=True))
    assert ledger.documents == len(found)
    return found, ledger


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": t, "n": n}).encode() + b"\n" for n, t in enumerate(texts))


def _csv(texts: list[str]) -> bytes:
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows([["n", "text"], *enumerate(texts)])
    return sink.getvalue().encode()


def _table(texts: list[str]) -> pa.Table:
    return pa.table({"text": texts, "n": list(range(len(texts)))})


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_table(texts), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def arrow(texts: list[str], new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, _table(texts).schema) as writer:
        writer.write_table(_table(texts), max_chunksize=2)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": jsonl,
    "csv": _csv,
    "parquet": parquet,
    "arrow": arrow,
    "feather": lambda texts: arrow(texts, pa.ipc.new_stream),
}
"""Formats of records, by ending."""

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content[:100]) + gzip.compress(content[100:]),
    ".zst": lambda content: pa.Codec("zstd").compress(content).to_pybytes(),
}
"""By ending; a gzip file may have several members."""
