"""Which of the committed documents go into the shards: all, or all but the duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from configs.schema.corpus import DedupConfig
from pipelines.corpus.dedup import Duplicates, Positions, find_duplicates
from pipelines.corpus.ledger import NO_SOURCE, ONE_SOURCE
from pipelines.corpus.shards import SPLITS, Lengths, Split, document_tokens, read_batch
from pipelines.corpus.spans import FINGERPRINTS, part_path

_LARGEST = 10
_EXAMPLES = 3


class SelectedPart(NamedTuple):
    """The documents of a span's part that stay."""

    path: Path
    lengths: Lengths
    """Tokens of each."""
    rows: Positions | None
    """Their rows in the part; None if all stay."""


class Selection:
    """The documents of spans 0 to `spans` - 1 in the order of the plan, without the duplicates that were found."""

    def __init__(self, parts: Path, spans: int, starts: list[int], duplicates: Duplicates | None) -> None:
        self._parts = parts
        self._spans = spans
        self._starts = starts
        self._duplicates = duplicates

    @classmethod
    def make(cls, parts: Path, spans: int, config: DedupConfig | None) -> Self:
        """Looks for duplicates in the fingerprints of all spans, if `config` asks for it; then Ray must be
        initialised."""
        if config is None:
            return cls(parts, spans, [], None)
        files = [part_path(parts, number, FINGERPRINTS) for number in range(spans)]
        counts = [read_batch(path).num_rows for path in files]
        return cls(parts, spans, np.cumsum([0, *counts]).tolist(), find_duplicates(files, counts, config))

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """Documents left out, by source and reason."""
        found = self._duplicates
        if found is None:
            return {}
        counts: dict[str, Counter[str]] = {}
        for number in range(self._spans):
            start, end = self._starts[number : number + 2]
            begin, stop = np.searchsorted(found.dropped, [start, end])
            if begin < stop:
                names = self._sources(number, found.dropped[begin:stop] - start)
                for name, exact in zip(names, found.exact[begin:stop].tolist(), strict=True):
                    counts.setdefault(name, Counter())["exact_duplicate" if exact else "near_duplicate"] += 1
        return {name: dict(reasons) for name, reasons in counts.items()}

    def _sources(self, number: int, rows: npt.NDArray[np.int64]) -> list[str]:
        """Where these documents of a span are from, as reports name it."""
        splits = self._splits(number)
        names: npt.NDArray[np.object_] = np.full(len(splits), None, dtype=object)
        for place, split in enumerate(SPLITS):
            batch = read_batch(part_path(self._parts, number, split))
            if "source" not in batch.schema.names:
                return [ONE_SOURCE] * len(rows)
            names[splits == place] = batch.column("source").to_numpy(zero_copy_only=False)
        return [name or NO_SOURCE for name in names[rows].tolist()]

    def parts(self, split: Split) -> Iterator[SelectedPart]:
        """What stays of a split, span by span; reads a few bytes a document."""
        for number in range(self._spans):
            path = part_path(self._parts, number, split)
            lengths = document_tokens(read_batch(path))
            if self._duplicates is None:
                yield SelectedPart(path, lengths, None)
                continue
            start, end = self._starts[number : number + 2]
            stays = np.ones(end - start, dtype=bool)
            stays[self._duplicates.of_span(start, end - start)] = False
            kept = np.flatnonzero(stays[self._splits(number) == SPLITS.index(split)])
            yield SelectedPart(path, lengths[kept], kept)

    def figures(self) -> dict[str, Any] | None:
        """What a report says about duplicates; None if they were not looked for."""
        found = self._duplicates
        if found is None:
            return None
        exact = int(found.exact.sum())
        pairs = [np.flatnonzero(found.exact == kind)[:_EXAMPLES] for kind in (True, False)]
        return {
            "exact": exact,
            "near": len(found.dropped) - exact,
            "rate": round(len(found.dropped) / max(self._starts[-1], 1), 6),
            "largest": [
                {"kept": self._name(position), "documents": documents}
                for position, documents in found.largest(_LARGEST)
            ],
            "examples": [
                {
                    "dropped": self._name(int(found.dropped[place])),
                    "kept": self._name(int(found.kept[place])),
                    "exact": bool(found.exact[place]),
                }
                for place in np.concatenate(pairs).tolist()
            ],
        }

    def _splits(self, number: int) -> npt.NDArray[np.uint8]:
        """Place in `SPLITS` of each document of a span."""
        return read_batch(part_path(self._parts, number, FINGERPRINTS)).column("split").to_numpy()

    def _name(self, position: int) -> str:
        """What the document at `position` is called in the source."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        splits = self._splits(number)
        row = position - self._starts[number]
        names = read_batch(part_path(self._parts, number, SPLITS[splits[row]])).column("name")
        return str(names[int(np.count_nonzero(splits[:row] == splits[row]))].as_py())
