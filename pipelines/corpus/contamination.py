"""The contamination gate: training documents that hold a passage of an evaluation set.

An evaluation set is registered by the 64-bit hashes of all its runs of `words` words (n-grams; Brown et al., "Language
Models are Few-Shot Learners", 2020, appendix C, uses 13). An item with fewer words is registered whole, down to
`shortest_words`; what is shorter still is counted as unchecked, because any text may hold it. A training document that
holds a registered run is dropped, or the corpus refused; or it is kept and counted, and then no model that learned from
the corpus is scored on the set. Case and punctuation do not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.store.artifacts import Artifact
from configs.artifacts import hash_json
from configs.errors import DataError
from configs.schema.base import content_literals
from configs.schema.corpus import ContaminationConfig, CorpusConfig, EvaluationSetConfig, FieldsConfig
from pipelines.corpus.account import Account
from pipelines.corpus.documents import Documents, read_documents
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.pieces import plan_spans
from pipelines.corpus.shards import CheckedSet, read_batch, write_batch
from pipelines.corpus.shingles import Hashes, lengthen, runs, split_words, word_hashes
from pipelines.corpus.sources import list_source

HELD_OUT = "heldout.jsonl"
_DESCRIBED = b"evaluation sets"
_LISTING_BYTES = 1 << 40
"""An evaluation set is read in one go."""
_FILTER_BITS = 24
"""Of the hash of an n-gram's first words, that are looked up first; most of a corpus ends there."""


@dataclass(frozen=True)
class Registered:
    """Evaluation sets whose fingerprints are in a file that every worker can read."""

    path: Path
    sets: dict[str, CheckedSet]
    keeps: bool
    """Whether documents that overlap stay in the corpus."""

    @property
    def digest(self) -> str:
        """Of the sets, of how overlaps are found and of what becomes of them."""
        return hash_json([{name: checked.model_dump() for name, checked in self.sets.items()}, self.keeps])


def evaluation_sets(config: CorpusConfig, inputs: Mapping[str, Artifact]) -> dict[str, EvaluationSetConfig]:
    """The sets that `config` names, by name: those read from files, and the held-out pairs of dataset artifacts.

    Raises:
        DataError: an artifact holds no held-out pairs, or two sets have one name.
    """
    sets = dict(config.contamination.sets)
    for name in config.evaluation_data:
        path = inputs[f"evaluation_data.{name}"].path / HELD_OUT
        if not path.is_file() or name in sets:
            raise DataError(
                f"evaluation_data.{name} cannot be registered",
                received=f"{path}" if name not in sets else "a name that contamination.sets has too",
                allowed=f"a dataset artifact with {HELD_OUT}, under a name of its own",
                next_step="name an artifact of the stage `instructions`",
            )
        sets[name] = held_out_pairs(path)
    return sets


def held_out_pairs(path: Path) -> EvaluationSetConfig:
    """The evaluation set that the held-out pairs of a dataset artifact, in `path`, make."""
    return EvaluationSetConfig(path=str(path), format="jsonl", texts=("prompt", "completion"))


def set_digest(config: EvaluationSetConfig) -> str:
    """Digest of a set's files and of how they are read."""
    return hash_json([list_source(config).digest, content_literals(config)])


def register(sets: Mapping[str, EvaluationSetConfig], config: ContaminationConfig, path: Path) -> Registered:
    """Reads `sets` (at least one) and writes their n-gram fingerprints to `path`, for `Gate.load`.

    Raises:
        DataError: a set is not there, holds nothing that can be checked, or too much of it is unusable.
    """
    checked: dict[str, CheckedSet] = {}
    tables: list[pa.Table] = []
    for number, name in enumerate(sorted(sets)):
        found: dict[int, list[Hashes]] = {}
        items = unchecked = 0
        for text in _texts(sets[name]):
            words = word_hashes(text)
            size = min(len(words), config.words)
            items += 1
            if size < config.shortest_words:
                unchecked += 1
            else:
                starts = np.arange(len(words) - size + 1)
                first = runs(words, config.shortest_words)[: len(starts)]
                grams = np.stack([first, lengthen(first, words, starts, config.shortest_words, size)])
                found.setdefault(size, []).append(grams)
        by_size = {size: np.unique(np.concatenate(grams, axis=1), axis=1) for size, grams in sorted(found.items())}
        if not by_size:
            raise DataError(
                f"evaluation set {name} has no item that a document can be checked against",
                received=f"{items} items, all shorter than {config.shortest_words} words",
                allowed="a set with longer items, or a smaller contamination.shortest_words",
                next_step="see that its `texts` name the fields that hold the text",
            )
        tables += [_table(grams, size, number) for size, grams in by_size.items()]
        checked[name] = CheckedSet(
            digest=set_digest(sets[name]),
            items=items,
            unchecked_items=unchecked,
            ngrams=sum(grams.shape[1] for grams in by_size.values()),
            words=config.words,
        )
    batch = pa.concat_tables(tables).combine_chunks().to_batches()[0]
    keeps = config.action == "keep"
    described = {"sets": sorted(sets), "shortest_words": config.shortest_words, "keeps": keeps}
    write_batch(path, batch.replace_schema_metadata({_DESCRIBED: json.dumps(described)}))
    return Registered(path, checked, keeps)


def _table(grams: Hashes, size: int, number: int) -> pa.Table:
    count = grams.shape[1]
    return pa.table(
        {
            "first": pa.array(grams[0]),
            "hash": pa.array(grams[1]),
            "words": pa.array(np.full(count, size, dtype=np.uint8)),
            "set": pa.array(np.full(count, number, dtype=np.uint16)),
        }
    )


def _texts(config: EvaluationSetConfig) -> Iterator[bytes]:
    """Every item of a set."""
    listing = list_source(config)
    for name in config.texts:
        source = config.model_copy(update={"fields": FieldsConfig(text=name)})
        account = Account()
        account.reject(listing.unreadable)
        for pieces in plan_spans(listing, source, _LISTING_BYTES):
            ledger = Ledger()
            for documents in read_documents(listing, pieces, source, ledger):
                yield from documents.texts
            account.add(ledger)
        account.check(len(listing.files) + len(listing.unreadable), source)


@dataclass(frozen=True)
class Overlap:
    """A passage that a document shares with an evaluation set."""

    name: str
    """Of the set."""
    passage: str
    """Its words, lower-cased."""


class Gate:
    """Looks documents up in the fingerprints of the registered sets."""

    def __init__(
        self,
        names: Sequence[str],
        by_size: Mapping[int, tuple[Hashes, npt.NDArray[np.uint16]]],
        shortest_words: int,
        firsts: Hashes,
        keeps: bool,
    ) -> None:
        self.keeps = keeps
        self._names = names
        self._by_size = by_size
        self._shortest_words = shortest_words
        self._occurs = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._occurs[firsts >> np.uint64(64 - _FILTER_BITS)] = True

    @classmethod
    def load(cls, path: Path) -> Self:
        """Opens what `register` wrote."""
        batch = read_batch(path)
        sizes = batch.column("words").to_numpy()
        hashes, numbers = batch.column("hash").to_numpy(), batch.column("set").to_numpy()
        by_size = {}
        for size in np.unique(sizes).tolist():
            chosen = np.flatnonzero(sizes == size)
            chosen = chosen[np.lexsort((numbers[chosen], hashes[chosen]))]
            by_size[size] = (hashes[chosen], numbers[chosen])
        described = json.loads(batch.schema.metadata[_DESCRIBED])
        firsts = batch.column("first").to_numpy()
        return cls(described["sets"], by_size, described["shortest_words"], firsts, described["keeps"])

    def overlap(self, text: bytes) -> Overlap | None:
        """The first passage that `text` (UTF-8) shares with a set, longest n-grams first; None if there is none."""
        words = word_hashes(text)
        firsts = runs(words, self._shortest_words)
        likely = np.flatnonzero(self._occurs[firsts >> np.uint64(64 - _FILTER_BITS)])
        for size in sorted(self._by_size, reverse=True):
            hashes, numbers = self._by_size[size]
            starts = likely[likely <= len(words) - size]
            grams = lengthen(firsts[starts], words, starts, self._shortest_words, size)
            places = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
            found = np.flatnonzero(hashes[places] == grams)
            if len(found):
                begin = int(starts[found[0]])
                passage = " ".join(split_words(text.decode())[begin : begin + size])
                return Overlap(self._names[int(numbers[places[found[0]]])], passage)
        return None


def reason(name: str) -> str:
    """What documents that overlap with the set `name` are dropped for."""
    return f"overlap_{name}"


def drop_overlapping(documents: Documents, held_out: Sequence[bool], gate: Gate, ledger: Ledger) -> list[int]:
    """Rows of `documents` that stay; those that overlap with a set and are not held out are counted in `ledger`."""
    kept = []
    for row, text in enumerate(documents.texts):
        found = None if held_out[row] else gate.overlap(text)
        if found is None or gate.keeps:
            kept.append(row)
        if found is not None and gate.keeps:
            ledger.overlaps[found.name] = ledger.overlaps.get(found.name, 0) + 1
        elif found is not None:
            passage = f"{found.passage} ...".encode()
            name, digest, source = documents.names[row], documents.digests[row], documents.source(row)
            ledger.drop(reason(found.name), name, digest, passage, source)
            ledger.documents -= 1
    return kept


def settle(registered: Registered | None, account: Account, config: ContaminationConfig) -> dict[str, CheckedSet]:
    """What the corpus says about the sets it was checked against.

    Raises:
        DataError: documents overlap, and the config refuses them.
    """
    if registered is None:
        return {}
    dropped = {name: account.drops.get(reason(name), 0) for name in registered.sets}
    worst = max(sorted(dropped), key=dropped.__getitem__)
    if config.action == "refuse" and dropped[worst]:
        example = account.examples[reason(worst)][0]
        raise DataError(
            f"{dropped[worst]} training documents overlap with the evaluation set {worst}; {example.name} holds "
            f"{example.text!r}",
            received=f"{sum(dropped.values())} overlapping documents",
            allowed="none: contamination.action is refuse",
            next_step="leave the documents out (source.exclude), or set contamination.action to drop",
        )
    return {
        name: checked.model_copy(update={"dropped": dropped[name], "kept": account.overlaps.get(name, 0)})
        for name, checked in registered.sets.items()
    }


def process_gate(registered: Registered) -> Gate:
    """The one gate that this process keeps."""
    return _load_once(registered.path, registered.digest)


@lru_cache(maxsize=1)
def _load_once(path: Path, _digest: str) -> Gate:
    """`_digest` tells one file from the next at the same path."""
    return Gate.load(path)
