"""Looking into a corpus: its documents as they were, as tokens, and where they came from.

Every block that is looked at is verified first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from configs.errors import ContractError, DataError, InputError
from pipelines.corpus.packing import ConcatPacking, Packing, PackingReport, best_fit_packing, document_packing
from pipelines.corpus.permutation import Permutation
from pipelines.corpus.reading import ShardFolder, TokenStream
from pipelines.corpus.shards import CorpusIndex

_DIGITS = 8
"""Least digits of a hash that stand for a document."""


@dataclass(frozen=True)
class Token:
    """A token of a document; `piece` is how the vocabulary spells it."""

    id: int
    piece: str


@dataclass(frozen=True)
class InspectedDocument:
    """A document of a corpus."""

    id: str
    """`split/number`, numbers in the order of the shards."""
    shard: str
    """File it lies in, relative to the corpus."""
    row: int
    """Its place in that file."""
    origin: dict[str, Any]
    """What the shard says of it beside its tokens: name in the source, size, hash."""
    tokens: tuple[Token, ...]
    """End-of-text included."""
    text: str
    """What the tokens decode to: for a byte-level tokenizer, the document to the byte."""


class Inspector:
    """Documents of one corpus."""

    def __init__(self, index: CorpusIndex, streams: dict[str, TokenStream], tokenizer: Tokenizer) -> None:
        self.index = index
        self._streams = streams
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, corpus: Path, tokenizer: Path) -> Self:
        """Opens a corpus with the folder of the tokenizer it was made with.

        Raises:
            ArtifactError: there is no corpus in the folder.
            ContractError: the tokenizer cannot be opened, or has another vocabulary than the corpus.
            CorruptArtifactError: the corpus's index is damaged.
        """
        index = CorpusIndex.load(corpus)
        path = tokenizer / "tokenizer.json"
        try:
            opened = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ContractError(
                f"{path} is not a tokenizer", received=str(error), allowed="the tokenizer the corpus was made with"
            ) from error
        if opened.get_vocab_size() != index.vocab_size:
            raise ContractError(
                f"{tokenizer} is not the tokenizer that {corpus} was made with",
                received=f"{opened.get_vocab_size()} entries",
                allowed=f"{index.vocab_size} entries",
            )
        files = ShardFolder(corpus)
        streams = {split: TokenStream(files, record, index.block_bytes) for split, record in index.splits.items()}
        return cls(index, streams, opened)

    def find(self, identifier: str) -> InspectedDocument:
        """The document called `identifier`: `split/number`, its name or id in the source, or the start of its blake3.

        Raises:
            DataError: there is none.
            InputError: several are called so.
        """
        split, _, number = identifier.rpartition("/")
        if split in self._streams and number.isdecimal():
            return self.document(split, int(number))
        found = list(self._called(identifier))
        if not found:
            raise DataError(
                "the corpus has no such document", received=identifier,
                allowed="split/number, a name or id in the source, or the first 8 digits or more of a blake3",
                next_step="ganymede corpus inspect ARTIFACT --sample 5 shows some",
            )  # fmt: skip
        if len(found) > 1:
            raise InputError(
                "several documents are called so", received=identifier,
                allowed=", ".join(f"{split}/{number}" for split, number in found[:5]),
            )  # fmt: skip
        return self.document(*found[0])

    def sample(self, split: str, count: int) -> list[InspectedDocument]:
        """`count` documents of `split` (all, if there are fewer) in random order; the same ones at every call."""
        documents = self._streams[split].record.documents
        order = Permutation(documents, b"inspect")(np.arange(min(count, documents)))
        return [self.document(split, number) for number in order.tolist()]

    def document(self, split: str, number: int) -> InspectedDocument:
        """Document `number` of `split`. Raises `DataError` if there are not so many."""
        stream = self._streams[split]
        if not 0 <= number < stream.record.documents:
            raise DataError(
                f"split {split} has no such document", received=number, allowed=f"0 to {stream.record.documents - 1}"
            )
        ends = np.cumsum([shard.documents for shard in stream.record.shards])
        shard = int(np.searchsorted(ends, number, side="right"))
        row = number - int(ends[shard]) + stream.record.shards[shard].documents
        batch = stream.reader(shard).documents()
        origin = {name: batch.column(name)[row].as_py() for name in batch.schema.names if name != "tokens"}
        ids = batch.column("tokens")[row].values.to_pylist()
        tokens = tuple(Token(id_, str(self._tokenizer.id_to_token(id_))) for id_ in ids)
        text = self._tokenizer.decode(ids[:-1], skip_special_tokens=False)
        path = stream.record.shards[shard].path
        return InspectedDocument(f"{split}/{number}", path, row, origin, tokens, text)

    def packing(self, split: str, row_tokens: int) -> dict[str, PackingReport]:
        """What each layout would do to the documents of `split` at `row_tokens` inputs a row.

        `concat` is left out where the split is shorter than one row.
        """
        offsets = self._streams[split].offsets()
        layouts: dict[str, Packing] = {
            "best_fit": best_fit_packing(offsets, row_tokens),
            "one_document": document_packing(offsets, row_tokens),
        }
        if offsets[-1] > row_tokens:
            layouts = {"concat": ConcatPacking(int(offsets[-1]), row_tokens), **layouts}
        return {layout: packing.report(offsets) for layout, packing in layouts.items()}

    def _called(self, identifier: str) -> Iterator[tuple[str, int]]:
        for split, stream in self._streams.items():
            first = 0
            for shard, record in enumerate(stream.record.shards):
                batch = stream.reader(shard).documents()
                names = [batch.column(name).to_pylist() for name in ("name", "id") if name in batch.schema.names]
                for row, (digest, *called) in enumerate(zip(batch.column("blake3").to_pylist(), *names, strict=True)):
                    if identifier in called or (len(identifier) >= _DIGITS and digest.startswith(identifier)):
                        yield split, first + row
                first += record.documents
