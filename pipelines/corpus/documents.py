"""The documents of a source: read, cleaned and filtered in one pass, with an account of everything that was read.

Every stage that needs text takes it from `read_documents`, so a tokenizer, a corpus and instruction pairs made from one
source config see the same documents. The order is that of the pieces; nothing depends on who reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import blake3
import pyarrow as pa

from configs.schema.corpus import MESSAGE_FORMATS, SourceConfig
from pipelines.corpus.blocks import Block, Conversation, Message, Read
from pipelines.corpus.clean import Step, clean, steps
from pipelines.corpus.filters import Filters
from pipelines.corpus.language import Languages
from pipelines.corpus.ledger import Ledger, source_name
from pipelines.corpus.lines import LINE_READERS
from pipelines.corpus.pieces import SMALLEST_SPAN_BYTES, Piece, file_format, plan_spans
from pipelines.corpus.sources import Listing, Rejected, hash_fraction
from pipelines.corpus.streams import MAX_RECORD_BYTES, Stream
from pipelines.corpus.tables import TABLE_READERS

_SAMPLED_PIECES = 4096
"""Pieces that a large source is cut into when it is sampled."""


@dataclass
class Documents:
    """Documents of one file as columns, cleaned and kept by the filters."""

    names: list[str] = field(default_factory=list)
    """The file, and for a file of many documents `:` and the place in it."""
    texts: list[bytes] = field(default_factory=list)
    """UTF-8."""
    digests: list[str] = field(default_factory=list)
    """blake3 of the text, hex."""
    ids: list[str | None] = field(default_factory=list)
    """Empty unless the source maps such a field; likewise the next two."""
    sources: list[str | None] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    """What is encoded instead of the texts, which are then the contents; empty unless the source maps messages."""

    def source(self, row: int) -> str:
        """Where the document of `row` is from, as reports name it."""
        return source_name(self.sources, row)

    def extend(self, other: Documents, rows: Sequence[int]) -> None:
        """Appends some rows of `other`, except their texts and conversations."""
        for column in ("names", "digests", "ids", "sources", "labels"):
            values = getattr(other, column)
            if values:
                getattr(self, column).extend(values[row] for row in rows)


def read_documents(
    listing: Listing, pieces: Iterable[Piece], config: SourceConfig, ledger: Ledger
) -> Iterator[Documents]:
    """The documents of `pieces`, in order; `ledger` gets all else.

    Raises:
        ConfigError: the filters name a language that cannot be told.
        DataError: a file changed since it was listed.
    """
    refiner = _Refiner(config, ledger)
    for piece in pieces:
        changes = steps(config.cleaning, piece.file.name)
        whole = file_format(piece.file.name, config)[0] == "text"
        for found in _read(listing, piece, config):
            if isinstance(found, Rejected):
                ledger.rejected.append(found)
            elif found.positions:
                yield refiner.refine(found, piece.file.name, whole, changes)


def _read(listing: Listing, piece: Piece, config: SourceConfig) -> Read:
    name = piece.file.name
    kind, compression = file_format(name, config)
    if config.fields.messages is not None and kind not in MESSAGE_FORMATS:
        yield Rejected(name, 0, f"format {kind} has no field {config.fields.messages!r} of messages", rest=True)
        return
    if kind == "text" and piece.file.size_bytes <= MAX_RECORD_BYTES:
        opened = pa.BufferReader(listing.read(piece.file))  # compared with the listing
    else:
        opened = listing.open(piece.file)
    with opened:
        if kind in LINE_READERS:
            yield from LINE_READERS[kind](Stream(opened, compression), name, piece.begin, piece.end, config)
        elif compression is None:
            yield from TABLE_READERS[kind](opened, name, piece.begin, piece.end, config)
        else:  # tables are read back and forth
            stream = Stream(opened, compression)
            content = stream.read(sys.maxsize)
            if stream.failure is None:
                yield from TABLE_READERS[kind](pa.BufferReader(content), name, piece.begin, piece.end, config)
            else:
                yield stream.lost(name, 0)


class _Refiner:
    """Cleans and filters blocks of documents; the ledger gets what becomes of each."""

    def __init__(self, config: SourceConfig, ledger: Ledger) -> None:
        self._filters = Filters(config.filters)
        self._languages = None if config.filters.language is None else Languages.load(config.filters.language)
        self._ledger = ledger

    def refine(self, block: Block, file: str, whole: bool, changes: list[Step]) -> Documents:
        """The block's documents, cleaned; without those that are empty or dropped."""
        rows: list[int] = []
        cleaned: list[bytes] = []
        conversations: dict[int, Conversation] = {}
        chats = block.conversations
        for row in range(len(block.positions)):
            texts = [m.content for m in chats[row]] if chats else [block.texts[row]]
            contents = self._clean(block, row, texts, file, changes)
            if contents is None:
                continue
            rows.append(row)
            cleaned.append(contents[0] if len(contents) == 1 else b"\n\n".join(filter(None, contents)))
            if chats:
                turns = zip(chats[row], contents, strict=True)
                conversations[row] = tuple(Message(m.role, content.decode()) for m, content in turns)
        documents = Documents()
        kept: list[int] = []
        for row, content, reason in self._judge(block, rows, cleaned):
            name = file if whole else f"{file}:{block.positions[row]}"
            digest = blake3.blake3(content).hexdigest()
            if reason is not None:
                self._ledger.drop(reason, name, digest, content, source_name(block.sources, row))
                continue
            kept.append(row)
            documents.names.append(name)
            documents.texts.append(content)
            documents.digests.append(digest)
        documents.conversations = [conversations[row] for row in kept if conversations]
        for column in ("ids", "sources", "labels"):
            values = getattr(block, column)
            if values:
                setattr(documents, column, [values[row] for row in kept])
        self._ledger.documents += len(kept)
        return documents

    def _clean(self, block: Block, row: int, texts: list[str], file: str, changes: list[Step]) -> list[bytes] | None:
        """The texts of a document after cleaning, in UTF-8; None if nothing is left of them."""
        ledger = self._ledger
        try:
            contents = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            reason = f"not text that UTF-8 can hold: {error.reason}"
            ledger.rejected.append(Rejected(file, block.positions[row], reason))
            return None
        counts = ledger.counts(source_name(block.sources, row))
        counts.documents_read += 1
        changed: set[str] = set()
        for number, content in enumerate(contents):
            counts.read_bytes += len(content)
            contents[number], by = clean(content, changes)
            if by:
                changed.update(by)
        for step in changed:
            ledger.changes[step] = ledger.changes.get(step, 0) + 1
        if not any(contents):
            counts.empty += 1
            return None
        return contents

    def _judge(self, block: Block, rows: list[int], texts: list[bytes]) -> Iterator[tuple[int, bytes, str | None]]:
        """Each row with its text as it is after the filters, and why it is dropped, if it is."""
        spoken: list[str | None] = [None] * len(rows)
        if self._languages is not None:
            for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
                language = self._languages.identify(text)
                known = self._ledger.counts(source_name(block.sources, row)).languages
                known[language] = known.get(language, 0) + 1
                spoken[place] = None if self._languages.keeps(language) else "language"
        for row, foreign, (text, reason) in zip(rows, spoken, self._filters.apply(texts), strict=True):
            yield row, text, foreign or reason


def sample_texts(
    listing: Listing,
    config: SourceConfig,
    salt: str,
    limit_bytes: int,
    ledger: Ledger,
    wanted: Callable[[str], bool] = lambda digest: True,
) -> Iterator[bytes]:
    """Texts of documents whose digest is `wanted`, until they make `limit_bytes`.

    Pieces of files are taken in the order of a hash of `salt` and their content, so the sample depends on nothing else.
    """
    piece_bytes = max(SMALLEST_SPAN_BYTES, listing.size_bytes // _SAMPLED_PIECES)
    pieces = [piece for span in plan_spans(listing, config, piece_bytes) for piece in span]
    size = 0
    for piece in sorted(pieces, key=lambda p: (_fraction(salt, p), p.file.name, p.begin)):
        for documents in read_documents(listing, [piece], config, ledger):
            for digest, text in zip(documents.digests, documents.texts, strict=True):
                if size >= limit_bytes:
                    return
                if wanted(digest):
                    size += len(text)
                    yield text


def _fraction(salt: str, piece: Piece) -> float:
    return hash_fraction(salt, f"{piece.file.blake3}:{piece.begin}" if piece.begin else piece.file.blake3)
