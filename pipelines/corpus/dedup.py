"""Duplicate documents: exact by a 128-bit hash of the text, near by MinHash with banding over word n-grams.

A span's documents are fingerprinted while it is encoded (`Fingerprints`); the keys of each kind (the exact hash, each
band) are stored sorted. `find_duplicates` then joins each kind over all spans, in Ray tasks that each take a range of
keys, and unites what falls together. Of each set that is united, the document with the lowest position stays: positions
count documents in the order of the plan, that is by source, span and row. The result is a function of the documents
alone; it depends on no order of tasks, and on the cut into spans only as far as that decides the order.

Sources: Broder, "On the resemblance and containment of documents" (1997); banding as in Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3. Two documents that are both like a third are dropped with it even if they are
less like each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from rensa import RMinHash

from configs.schema.corpus import DedupConfig, NearConfig
from pipelines.corpus.shards import SPLITS, Split, read_batch, write_batch
from pipelines.corpus.shingles import Hashes, fold, ngrams, word_hashes
from pipelines.corpus.tasks import run_bounded

Positions = npt.NDArray[np.int64]

_SEED = 1
_SIGNED_AT_ONCE = 1 << 20
"""N-grams, or numbers of their signatures, that are gathered before they are signed; the latter are Python's for a
moment, of 40 bytes each."""
_JOINED_AT_ONCE = 1 << 22
"""Documents whose keys one task joins, about; bounds its memory, decides nothing."""
_GATHERED_FILES = 128
"""Spans whose fingerprints are gathered in one file before they are joined; fewer are joined as they are. Each of the
joining tasks, 15 for four million documents, opens every file that is left."""
_GATHERED_DOCUMENTS = 1 << 20
"""A gathering ends before it holds more; bounds the memory of its task, about 300 bytes a document."""


def band_keys(documents: Sequence[Hashes], near: NearConfig) -> Hashes:
    """One key a band for each document, given its n-grams (at least one each): [documents, bands].

    Two documents with the same n-grams have the same keys, whatever their order and repetition.
    """
    flat = np.concatenate(documents)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, near.bands * near.rows, _SEED)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(documents), near.bands, near.rows)
    return fold(signatures)


def _near_grams(text: bytes, near: NearConfig) -> Hashes:
    """The n-grams of `text`; of a shorter one all words together, of one without words the text itself."""
    words = word_hashes(text)
    if len(words) == 0:
        return np.array([xxhash.xxh3_64_intdigest(text)], dtype=np.uint64)
    return ngrams(words, min(near.words, len(words)))


class Fingerprints:
    """Gathers the keys of a span's documents, in the order of its rows."""

    def __init__(self, config: DedupConfig) -> None:
        self._config = config
        self._splits = bytearray()
        self._exact = bytearray()
        """Hashes of 16 bytes, one after the other: a span may hold millions of documents."""
        self._pending: list[Hashes] = []
        self._pending_grams = 0
        self._bands: list[Hashes] = []

    def add(self, text: bytes, split: Split) -> None:
        """Takes the span's next document, UTF-8."""
        self._splits.append(SPLITS.index(split))
        if self._config.exact:
            self._exact += xxhash.xxh3_128_digest(text)
        if self._config.near is not None:
            self._pending.append(_near_grams(text, self._config.near))
            self._pending_grams += len(self._pending[-1])
            signed = len(self._pending) * self._config.near.bands * self._config.near.rows
            if max(self._pending_grams, signed) >= _SIGNED_AT_ONCE:
                self._sign(self._config.near)

    def _sign(self, near: NearConfig) -> None:
        if self._pending:
            self._bands.append(band_keys(self._pending, near))
        self._pending, self._pending_grams = [], 0

    def batch(self) -> pa.RecordBatch:
        """Columns of one length: each document's split, and for each kind its keys, sorted, with their rows."""
        kinds: dict[str, Hashes] = {}
        if self._config.exact:
            kinds["exact"] = np.frombuffer(self._exact, dtype=">u8").astype(np.uint64).reshape(-1, 2)
        if self._config.near is not None:
            self._sign(self._config.near)
            keys = np.concatenate([*self._bands, np.empty((0, self._config.near.bands), dtype=np.uint64)])
            kinds |= {f"band{band}": keys[:, band : band + 1] for band in range(self._config.near.bands)}
        columns = {"split": pa.array(np.frombuffer(self._splits, dtype=np.uint8))}
        for kind, keys in kinds.items():
            columns |= _sorted_columns(kind, list(keys.T), np.arange(len(keys)))
        return pa.RecordBatch.from_pydict(columns)


def _sorted_columns(kind: str, words: list[Hashes], rows: Positions) -> dict[str, pa.Array]:
    """The keys of one kind, given the words of the keys of `rows`, as columns in the order of the keys."""
    order = np.lexsort(words[::-1])
    keys = {f"{kind}.key{place}": pa.array(word[order]) for place, word in enumerate(words)}
    return {**keys, f"{kind}.row": pa.array(rows[order].astype(np.uint32))}


def key_kinds(config: DedupConfig) -> dict[str, int]:
    """Kinds of keys that documents are joined on, with the 64-bit words in a key."""
    bands = 0 if config.near is None else config.near.bands
    return ({"exact": 2} if config.exact else {}) | {f"band{band}": 1 for band in range(bands)}


@dataclass(frozen=True)
class _Gathering:
    """Fingerprints of spans that follow each other."""

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    """Of each span's first document, counted from the first of all these."""
    out: Path
    kinds: dict[str, int]


def _gather(task: _Gathering) -> Path:
    """Writes the fingerprints of several spans as if they were one."""
    batches = [read_batch(path) for path in task.files]
    columns: dict[str, pa.Array] = {}
    for kind, width in task.kinds.items():
        words = [np.concatenate([b.column(f"{kind}.key{place}").to_numpy() for b in batches]) for place in range(width)]
        rows = [b.column(f"{kind}.row").to_numpy() + np.int64(s) for b, s in zip(batches, task.starts, strict=True)]
        columns |= _sorted_columns(kind, words, np.concatenate(rows))
    temporary = task.out.with_name(f".{task.out.name}.{os.getpid()}.tmp")
    write_batch(temporary, pa.RecordBatch.from_pydict(columns))
    return temporary.replace(task.out)


def _gathered(files: Sequence[Path], documents: Sequence[int], config: DedupConfig) -> tuple[list[Path], list[int]]:
    """Fewer files with the same fingerprints, and how many documents each holds."""
    sums = np.cumsum([0, *documents])
    groups: list[list[int]] = [[]]
    for number in range(len(files)):
        group = groups[-1]
        if len(group) == _GATHERED_FILES or (group and sums[number + 1] - sums[group[0]] > _GATHERED_DOCUMENTS):
            groups.append(group := [])
        group.append(number)
    tasks = [
        _Gathering(
            files=tuple(files[n] for n in group),
            starts=tuple(int(sums[n] - sums[group[0]]) for n in group),
            out=files[0].parent / f"gathered-{place:06d}.arrow",
            kinds=key_kinds(config),
        )
        for place, group in enumerate(groups)
    ]
    with run_bounded(_gather, tasks) as written:
        paths = sorted(written)
    return paths, [int(sums[group[-1] + 1] - sums[group[0]]) for group in groups]


@dataclass(frozen=True)
class _Join:
    """The keys of one kind from `first` to `last` (inclusive, by their first word), over all spans."""

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    """Position of each span's first document."""
    kind: str
    width: int
    first: int
    last: int


def _join(task: _Join) -> tuple[str, Positions]:
    """Pairs (lowest position, other position) of documents with equal keys: [pairs, 2]."""
    keys: list[Hashes] = []
    positions: list[Positions] = []
    for path, start in zip(task.files, task.starts, strict=True):
        batch = read_batch(path)
        words = [batch.column(f"{task.kind}.key{place}").to_numpy() for place in range(task.width)]
        begin = int(np.searchsorted(words[0], np.uint64(task.first), side="left"))
        end = int(np.searchsorted(words[0], np.uint64(task.last), side="right"))
        keys.append(np.stack([word[begin:end] for word in words]))
        positions.append(batch.column(f"{task.kind}.row").to_numpy()[begin:end].astype(np.int64) + start)
    every, place = np.concatenate(keys, axis=1), np.concatenate(positions)
    if len(place) == 0:
        return task.kind, np.empty((0, 2), dtype=np.int64)
    order = np.lexsort((place, *every[::-1]))
    every, place = every[:, order], place[order]
    begins = np.append(True, (every[:, 1:] != every[:, :-1]).any(axis=0))
    lowest = place[begins][np.cumsum(begins) - 1]
    return task.kind, np.stack([lowest, place], axis=1)[~begins]


def unite(pairs: Positions) -> tuple[Positions, Positions]:
    """The positions in `pairs` that are not the lowest of what they are connected to, sorted, and that lowest of each.

    Union-find over all pairs at a time: every root is hooked under the lowest that a pair joins it to, then all paths
    are cut short, until nothing changes.
    """
    positions, flat = np.unique(pairs, return_inverse=True)
    one, other = flat.reshape(-1, 2).T
    roots = np.arange(len(positions))
    while True:
        first, second = roots[one], roots[other]
        if np.array_equal(first, second):
            break
        np.minimum.at(roots, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(roots, roots[roots]):
            roots = roots[roots]
    dropped = roots != np.arange(len(positions))
    return positions[dropped], positions[roots[dropped]]


@dataclass(frozen=True)
class Duplicates:
    """Documents to leave out, by position."""

    dropped: Positions
    """Sorted."""
    kept: Positions
    """For each, the document of its set that stays."""
    exact: npt.NDArray[np.bool_]
    """For each, whether a document before it has the same text."""

    def of_span(self, start: int, documents: int) -> Positions:
        """Rows of the span whose first document has position `start` that are left out."""
        begin, end = np.searchsorted(self.dropped, [start, start + documents])
        return self.dropped[begin:end] - start

    def largest(self, count: int) -> list[tuple[int, int]]:
        """The largest sets: (position of the document that stays, documents in the set)."""
        kept, others = np.unique(self.kept, return_counts=True)
        order = np.lexsort((kept, -others))[:count]
        return [(int(kept[i]), int(others[i]) + 1) for i in order]


def find_duplicates(files: Sequence[Path], documents: Sequence[int], config: DedupConfig) -> Duplicates:
    """Joins the fingerprints of all spans, given in the order of the plan. Ray must be initialised.

    Args:
        files: where each span's `Fingerprints.batch` was written.
        documents: how many documents each holds.
    """
    if len(files) > _GATHERED_FILES:
        files, documents = _gathered(files, documents, config)
    starts = tuple(np.cumsum([0, *documents]).tolist())
    exact: list[Positions] = []
    pairs: list[Positions] = []
    with run_bounded(_join, _joins(tuple(files), starts, config)) as joined:
        for kind, found in joined:
            pairs.append(found)
            if kind == "exact":
                exact.append(found[:, 1])
    nothing = np.empty((0, 2), dtype=np.int64)
    dropped, kept = unite(np.unique(np.concatenate([nothing, *pairs]), axis=0))
    same = np.concatenate([nothing[:, 1], *exact])
    return Duplicates(dropped, kept, np.isin(dropped, same))


def _joins(files: tuple[Path, ...], starts: tuple[int, ...], config: DedupConfig) -> Iterator[_Join]:
    slices = max(1, -(-starts[-1] // _JOINED_AT_ONCE))
    bounds = [(1 << 64) * number // slices for number in range(slices + 1)]
    for kind, width in key_kinds(config).items():
        for first, end in pairwise(bounds):
            yield _Join(files, starts[:-1], kind, width, first, end - 1)
