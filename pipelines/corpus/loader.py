"""Training batches from token shards.

Global sample k -> mixture (which source, and its how-manyeth sample) -> permutation (which row) -> packing (which runs
of the token stream) -> memory-mapped shards. Every link is a function, so a batch is a pure function of (corpora, seed,
step): there is no state to save, going to any step costs the same, and the slices of all ranks, one after the other,
are the same global batch for every number of workers.

A source's rows are visited in the order of a keyed permutation, another one each epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from configs.artifacts import hash_json
from configs.errors import ContractError, DataError, InputError
from configs.schema.data import Layout, Phase
from pipelines.corpus.mixture import Mixture
from pipelines.corpus.packing import (
    ConcatPacking,
    IndexPacking,
    PackedRows,
    Packing,
    PackingReport,
    Pieces,
    best_fit_packing,
    describe_pieces,
    describe_stream,
    document_begins,
    document_packing,
    merge,
)
from pipelines.corpus.permutation import Permutation
from pipelines.corpus.reading import ShardFiles, ShardFolder, TokenStream
from pipelines.corpus.shards import CorpusIndex
from pipelines.corpus.stretches import Slice, Stretches

Rows = npt.NDArray[np.int64]

_KEPT_EPOCHS = 4
"""Permutations a source keeps: making one costs as much as using it."""


@dataclass(frozen=True)
class Rowing:
    """How rows are made of a split; what every source of a loader has in common."""

    split: str
    row_tokens: int
    layout: Layout = "concat"
    indexes: Path | None = None
    """Folder where the indexes of layouts other than `concat` are kept, so that they are made once."""


class Source:
    """The rows of one split of one corpus, in an order that seed and epoch give."""

    def __init__(self, name: str, index: CorpusIndex, stream: TokenStream, rowing: Rowing, seed: int) -> None:
        self.index = index
        self.stream = stream
        self._key = f"/{name}" if name else ""
        self._rowing = rowing
        self._seed = seed
        self._permutations: dict[int, Permutation] = {}

    @classmethod
    def open(cls, name: str, corpus: Path | ShardFiles, rowing: Rowing, seed: int) -> Self:
        """Raises as `Loader.open` does; `name` is mixed into the order of the rows."""
        files = ShardFolder(corpus) if isinstance(corpus, Path) else corpus
        index = files.index()
        record = index.splits.get(rowing.split)
        if record is None:
            raise DataError(f"{corpus} has no such split", received=rowing.split, allowed=", ".join(index.splits))
        if record.tokens <= rowing.row_tokens and rowing.layout == "concat":
            raise DataError(
                f"split {rowing.split} of {corpus} is shorter than one row",
                received=f"{record.tokens} tokens",
                allowed=f"at least {rowing.row_tokens + 1}",
                next_step="take more text, a larger split.validation_fraction or a shorter context_length",
            )
        return cls(name, index, TokenStream(files, record, index.block_bytes), rowing, seed)

    @cached_property
    def packing(self) -> Packing:
        """The rows; an index that was kept is taken, one that was made is kept."""
        rowing = self._rowing
        if rowing.layout == "concat":
            return ConcatPacking(self.stream.record.tokens, rowing.row_tokens)
        path = rowing.indexes / f"{self._digest()[:32]}.arrow" if rowing.indexes else None
        kept = IndexPacking.open(path, rowing.row_tokens) if path else None
        if kept is not None:
            return kept
        pack = best_fit_packing if rowing.layout == "best_fit" else document_packing
        packing = pack(self.offsets, rowing.row_tokens)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            packing.write(path)
        return packing

    def _digest(self) -> str:
        """What decides the rows: the split's blocks, and how rows are made of them."""
        rowing = self._rowing
        blocks = [shard.blocks for shard in self.stream.record.shards]
        return hash_json([blocks, rowing.split, rowing.row_tokens, rowing.layout])

    @cached_property
    def offsets(self) -> Rows:
        """Where each document begins in the stream, and the end."""
        return self.stream.offsets()

    def order(self, ordinals: Rows) -> tuple[Rows | int, Rows]:
        """Epoch (one for all, if they have the same) and row of samples, in rising order: sample k is position k mod
        rows of epoch k div rows.
        """
        size = self.packing.rows
        first, last = int(ordinals[0]) // size, int(ordinals[-1]) // size
        if first == last:
            return first, self._permutation(first)(ordinals - first * size)
        epochs = ordinals // size
        positions = ordinals - epochs * size
        rows = [self._permutation(epoch)(positions[epochs == epoch]) for epoch in range(first, last + 1)]
        return epochs, np.concatenate(rows)

    def _permutation(self, epoch: int) -> Permutation:
        kept = self._permutations.get(epoch)
        if kept is None:
            if len(self._permutations) == _KEPT_EPOCHS:
                del self._permutations[next(iter(self._permutations))]
            kept = Permutation(self.packing.rows, f"{self._seed}/{epoch}{self._key}".encode())
            self._permutations[epoch] = kept
        return kept


class Sample(NamedTuple):
    """A row of a batch, and where its tokens come from."""

    source: str
    epoch: int
    """Of the source, from 0."""
    row: int
    """Of the source's packing."""
    documents: tuple[int, ...]
    """Numbers in the source's split, in the order of the row; a document cut in two may come twice."""


class _Share(NamedTuple):
    """What one source gives to a batch: rows of epochs, and which rows of the batch they become."""

    number: int
    source: Source
    slots: Rows
    epochs: Rows | int
    rows: Rows


class Loader:
    """Batches of one split of a corpus, or of several corpora in given proportions."""

    def __init__(self, sources: Sequence[Source], mixture: Mixture, *, rowing: Rowing, batch_rows: int) -> None:
        self._sources = sources
        self._mixture = mixture
        self._row_tokens = rowing.row_tokens
        self._padded = rowing.layout != "concat"
        self._batch_rows = batch_rows
        shape = {"batch_rows": batch_rows, "row_tokens": rowing.row_tokens}
        self._batches: Stretches[Rows] = Stretches(
            lambda steps, its: self._plain(self._draw(steps, its)), lambda rows, part: rows[part].copy(), **shape
        )
        self._packed_batches: Stretches[PackedRows] = Stretches(
            lambda steps, its: self._described(self._draw(steps, its)), PackedRows.part, **shape
        )
        self.vocab_size = sources[0].index.vocab_size
        self.tokens = sum(s.stream.record.tokens for s in sources)
        self.bytes_per_token = sum(s.stream.record.text_bytes for s in sources) / self.tokens

    @cached_property
    def _row_starts(self) -> Rows:
        return np.concatenate([[0], np.cumsum([s.packing.rows for s in self._sources], dtype=np.int64)])

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources."""
        return int(self._row_starts[-1])

    @classmethod
    def open(
        cls,
        corpus: Path | ShardFiles,
        *,
        split: str,
        row_tokens: int,
        batch_rows: int,
        seed: int,
        layout: Layout = "concat",
        indexes: Path | None = None,
    ) -> Self:
        """Opens `split` of the corpus in a folder, or in an object store (`ShardCache`).

        Shards are memory-mapped when they are first read. An index of layout `best_fit` or `one_document` is kept below
        `indexes`, if that is given.

        Raises:
            ArtifactError: the folder holds no corpus.
            CorruptArtifactError: the index, or a shard that a layout has to read, is damaged.
            DataError: there is no such split, or it is shorter than one row.
            StorageError: an object store does not answer.
        """
        rowing = Rowing(split, row_tokens, layout, indexes)
        source = Source.open("", corpus, rowing, seed)
        return cls([source], Mixture([Phase(weights={"": 1})], batch_rows), rowing=rowing, batch_rows=batch_rows)

    @classmethod
    def mix(
        cls, corpora: Mapping[str, Path | ShardFiles], phases: Sequence[Phase], rowing: Rowing, *,
        batch_rows: int, seed: int,
    ) -> Self:  # fmt: skip
        """Opens several corpora, made with one tokenizer, that `phases` gives weights to by name.

        Raises:
            ConfigError: the weights are not usable.
            ContractError: the corpora were made with different tokenizers.
            InputError: corpora and weights have different names.

        and what `open` raises.
        """
        mixture = Mixture(phases, batch_rows)
        if set(mixture.sources) != set(corpora):
            raise InputError(
                "a mixture gives weights to other corpora than there are",
                received=sorted(mixture.sources),
                allowed=", ".join(sorted(corpora)),
            )
        sources = [Source.open(name, corpora[name], rowing, seed) for name in mixture.sources]
        for name, source in zip(mixture.sources, sources, strict=True):
            if source.index.contract != sources[0].index.contract:
                raise ContractError(
                    f"corpora {mixture.sources[0]} and {name} were made with different tokenizers",
                    received=source.index.contract,
                    allowed=sources[0].index.contract,
                    next_step="make both with the same tokenizer artifact",
                )
        return cls(sources, mixture, rowing=rowing, batch_rows=batch_rows)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Rows:
        """The rows of `rank` in the global batch of `step` (from 0): [batch_rows / world_size, row_tokens + 1].

        Raises:
            CorruptArtifactError: a shard is damaged where the batch lies.
            InputError: the batch cannot be divided so.
            StorageError: an object store does not answer.
        """
        return self._batches.batch(step, self._slice(step, rank, world_size))

    def packed(self, step: int, rank: int = 0, world_size: int = 1) -> PackedRows:
        """The same rows as `batch`, with what keeps attention inside documents. Raises as `batch` does."""
        return self._packed_batches.batch(step, self._slice(step, rank, world_size))

    def ledger(self, step: int, rank: int = 0, world_size: int = 1) -> Rows:
        """Which samples `batch` gives: source, epoch of that source and row, [batch_rows / world_size, 3].

        Raises:
            InputError: the batch cannot be divided so.
        """
        shares = self._draw(range(step, step + 1), self._slice(step, rank, world_size))
        samples = np.empty((sum(len(share.slots) for share in shares), 3), dtype=np.int64)
        for share in shares:
            samples[share.slots, 0] = share.number
            samples[share.slots, 1] = share.epochs
            samples[share.slots, 2] = share.rows
        return samples

    def provenance(self, step: int) -> list[Sample]:
        """The rows of the global batch of `step` with the documents they hold, in the order of `ledger`."""
        samples: dict[int, Sample] = {}
        for share in self._draw(range(step, step + 1), self._slice(step, 0, 1)):
            epochs = np.broadcast_to(share.epochs, share.rows.shape)
            places = share.slots * (self._row_tokens + 1)
            pieces = share.source.packing.pieces(share.rows, places)
            offsets = share.source.offsets
            first = offsets.searchsorted(pieces.begins, side="right") - 1
            last = offsets.searchsorted(pieces.begins + pieces.lengths - 1, side="right") - 1
            held = [range(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
            bounds = [*pieces.places.searchsorted(places).tolist(), len(held)]
            name = self._mixture.sources[share.number]
            for i, (slot, epoch, row) in enumerate(zip(share.slots, epochs, share.rows, strict=True)):
                documents = tuple(itertools.chain.from_iterable(held[bounds[i] : bounds[i + 1]]))
                samples[int(slot)] = Sample(name, int(epoch), int(row), documents)
        return [samples[slot] for slot in sorted(samples)]

    def rows(self, count: int) -> Rows:
        """`count` rows (all, if there are fewer) spread evenly over the split, in document order: for evaluation."""
        return self._plain(self._spread(count))

    def packed_rows(self, count: int) -> PackedRows:
        """The same rows as `rows`, with what keeps attention inside documents."""
        return self._described(self._spread(count))

    def samples(self, steps: int) -> dict[str, int]:
        """How many samples of each source the first `steps` batches hold."""
        counts = self._mixture.taken(steps * self._batch_rows).tolist()
        return dict(zip(self._mixture.sources, counts, strict=True))

    def packing_reports(self) -> dict[str, PackingReport]:
        """What the layout does to each source's documents."""
        named = zip(self._mixture.sources, self._sources, strict=True)
        return {name: source.packing.report(source.offsets) for name, source in named}

    def _slice(self, step: int, rank: int, world_size: int) -> Slice:
        if self._batch_rows % world_size or not 0 <= rank < world_size or step < 0:
            raise InputError(
                "batch cannot be divided",
                received=f"step {step}, rank {rank} of {world_size}, batch_rows {self._batch_rows}",
                allowed="step >= 0, 0 <= rank < world_size, and a batch_rows that world_size divides",
                next_step="set training.batch_rows to a multiple of training.workers",
            )
        return Slice(rank, world_size)

    def _draw(self, steps: range, its: Slice) -> list[_Share]:
        """What each source gives to the rows of a slice in the batches of `steps`."""
        count = self._batch_rows // its.world_size
        first = np.array(steps) * self._batch_rows + its.rank * count
        samples = (first[:, np.newaxis] + np.arange(count)).ravel()
        if len(self._sources) == 1:
            return [_Share(0, self._sources[0], np.arange(len(samples)), *self._sources[0].order(samples))]
        sources, ordinals = self._mixture.draw(samples)
        shares = []
        for number, source in enumerate(self._sources):
            slots = np.flatnonzero(sources == number)
            if len(slots):
                shares.append(_Share(number, source, slots, *source.order(ordinals[slots])))
        return shares

    def _spread(self, count: int) -> list[_Share]:
        """`count` rows spread evenly over all sources, in order."""
        count = min(count, self.rows_per_epoch)
        chosen = np.arange(count, dtype=np.int64) * self.rows_per_epoch // count
        numbers = np.searchsorted(self._row_starts, chosen, side="right") - 1
        shares = []
        for number, source in enumerate(self._sources):
            slots = np.flatnonzero(numbers == number)
            if len(slots):
                rows = chosen[slots] - self._row_starts[number]
                shares.append(_Share(number, source, slots, 0, rows))
        return shares

    def _pieces(self, shares: list[_Share]) -> list[Pieces]:
        """The pieces of each share."""
        width = self._row_tokens + 1
        return [share.source.packing.pieces(share.rows, share.slots * width) for share in shares]

    def _plain(self, shares: list[_Share]) -> Rows:
        return self._tokens(shares, self._pieces(shares))

    def _tokens(self, shares: list[_Share], pieces: list[Pieces]) -> Rows:
        """Rows that hold `pieces` of `shares`; other places hold the end-of-text token."""
        count, width = sum(len(share.slots) for share in shares), self._row_tokens + 1
        result = np.empty(count * width, dtype=np.int64)
        if self._padded:
            result.fill(self._sources[0].index.end_of_text_id)
        for share, its in zip(shares, pieces, strict=True):
            share.source.stream.gather(its, result)
        return result.reshape(count, width)

    def _described(self, shares: list[_Share]) -> PackedRows:
        pieces = self._pieces(shares)
        tokens = self._tokens(shares, pieces)
        if self._padded:
            return describe_pieces(tokens, merge(pieces))
        begins = [document_begins(its, s.source.offsets) for s, its in zip(shares, pieces, strict=True)]
        return describe_stream(tokens, begins)
