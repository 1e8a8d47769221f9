"""What became of everything that was read: the sum over spans, and the decision whether too much of it is unusable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.errors import DataError
from configs.schema.corpus import SourceConfig
from pipelines.corpus.ledger import Example, Ledger, SourceCounts, lowest_examples
from pipelines.corpus.sources import Rejected


@dataclass
class Account:
    """Sums of ledgers and commit records; takes no more memory for more of them."""

    documents: int = 0
    """Read and kept."""
    rejected: int = 0
    first: Rejected | None = None
    """Of what was rejected, by name and place."""
    broken: set[str] = field(default_factory=set)
    """Files that could not be read to their end."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    overlaps: Counter[str] = field(default_factory=Counter)
    """Training documents kept although they overlap with an evaluation set, by set."""
    by_source: dict[str, SourceCounts] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Everything that was read."""
        return self.documents + self.empty + self.rejected + self.drops.total()

    @property
    def read_bytes(self) -> int:
        """Text as it was read."""
        return sum(counts.read_bytes for counts in self.by_source.values())

    @property
    def empty(self) -> int:
        """Records without text."""
        return sum(counts.empty for counts in self.by_source.values())

    @property
    def drops(self) -> Counter[str]:
        """Documents left out, by reason."""
        return sum((Counter(counts.drops) for counts in self.by_source.values()), Counter())

    @property
    def languages(self) -> Counter[str]:
        """Documents that the filters saw, by language; empty unless languages are told."""
        return sum((Counter(counts.languages) for counts in self.by_source.values()), Counter())

    def reject(self, rejected: Sequence[Rejected]) -> None:
        """Adds what is unusable."""
        self.rejected += len(rejected)
        self.broken.update(r.name for r in rejected if r.rest)
        known = () if self.first is None else (self.first,)
        self.first = min([*rejected, *known], key=lambda r: (r.name, r.offset), default=None)

    def add(self, ledger: Ledger) -> None:
        """Adds a ledger."""
        self.documents += ledger.documents
        self.reject(ledger.rejected)
        self.changes.update(ledger.changes)
        self.overlaps.update(ledger.overlaps)
        for reason, shown in ledger.examples.items():
            self.examples[reason] = lowest_examples([*self.examples.get(reason, ()), *shown])
        for source, counts in ledger.by_source.items():
            self._counts(source).add(counts)

    def leave_out(self, dropped: Mapping[str, Mapping[str, int]]) -> None:
        """Moves documents, counted by source and reason, from those that are kept to those that are dropped."""
        for source, drops in dropped.items():
            self.documents -= sum(drops.values())
            self._counts(source).add(SourceCounts(drops=dict(drops)))

    def _counts(self, source: str) -> SourceCounts:
        return self.by_source.setdefault(source, SourceCounts())

    def summary(self) -> Mapping[str, Any]:
        """The figures for a report; the same for any number and order of spans."""
        return {
            "records": self.records,
            "documents": self.documents,
            "read_bytes": self.read_bytes,
            "quarantined": self.rejected,
            "empty": self.empty,
            "drops": dict(sorted(self.drops.items())),
            "examples": {reason: [e.model_dump() for e in shown] for reason, shown in sorted(self.examples.items())},
            "changes": dict(sorted(self.changes.items())),
            "languages": dict(sorted(self.languages.items())),
        }

    def check(self, files: int, config: SourceConfig) -> None:
        """Compares what is unusable with what the config allows.

        The share that counts is that of records, or of the source's `files` that could not be read to their end if it
        is larger: of a file that breaks off nobody knows how many records it held.

        Raises:
            DataError: it is more than `max_bad_fraction`.
        """
        share = max(self.rejected / max(self.records, files), len(self.broken) / files)
        if self.first is None or share <= config.max_bad_fraction:
            return
        raise DataError(
            f"{self.rejected} of {self.records} records are unusable, and {len(self.broken)} of {files} files break "
            f"off; the first is {self.first.name} at byte {self.first.offset}: {self.first.reason}",
            received=round(share, 6),
            allowed=f"source.max_bad_fraction {config.max_bad_fraction}",
            next_step="mend or exclude the files (source.exclude), or raise source.max_bad_fraction",
        )
