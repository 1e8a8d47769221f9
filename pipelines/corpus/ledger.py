"""Where every record that was read went, and what became of the documents of each source."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from pipelines.corpus.sources import Rejected

EXAMPLES = 3
"""Dropped documents that are shown for each reason."""
ONE_SOURCE = "source"
"""What reports call the source if the config maps no field that says where a document is from."""
NO_SOURCE = "(none)"
"""What they call it if a record has no such field."""
_EXAMPLE_CHARS = 300


def source_name(sources: Sequence[str | None], row: int) -> str:
    """The source of a row of that column, as reports name it; the column is empty if the config maps no such field."""
    return (sources[row] or NO_SOURCE) if sources else ONE_SOURCE


class Example(BaseModel):
    """A dropped document, as a report shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    """blake3 of the document; the lowest are shown, so that the choice depends on the documents alone."""
    name: str
    text: str
    """How it begins."""


@dataclass
class SourceCounts:
    """What became of the documents of one source."""

    documents_read: int = 0
    """Records with a document in them, be it empty."""
    read_bytes: int = 0
    """Text as it was read, in UTF-8."""
    empty: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""
    languages: dict[str, int] = field(default_factory=dict)
    """Documents that the filters saw, by language; empty unless languages are told."""

    def add(self, other: SourceCounts) -> None:
        """Adds the counts of another part of the source."""
        self.documents_read += other.documents_read
        self.read_bytes += other.read_bytes
        self.empty += other.empty
        for counts, more in ((self.drops, other.drops), (self.languages, other.languages)):
            for key, count in more.items():
                counts[key] = counts.get(key, 0) + count


class Ledger(BaseModel):
    """Where every record that was read went: a document, empty, dropped for a reason or rejected."""

    model_config = ConfigDict(extra="forbid")

    documents: int = 0
    """Read and kept."""
    rejected: list[Rejected] = Field(default_factory=list)
    examples: dict[str, list[Example]] = Field(default_factory=dict)
    """Of documents that were left out, a few by reason."""
    changes: dict[str, int] = Field(default_factory=dict)
    """Documents changed, by cleaning step."""
    by_source: dict[str, SourceCounts] = Field(default_factory=dict)
    overlaps: dict[str, int] = Field(default_factory=dict)
    """Training documents kept although they overlap with an evaluation set, by set."""

    @property
    def empty(self) -> int:
        """Records without text."""
        return sum(counts.empty for counts in self.by_source.values())

    def counts(self, source: str) -> SourceCounts:
        """What is counted of `source`."""
        found = self.by_source.get(source)
        if found is None:
            found = self.by_source[source] = SourceCounts()
        return found

    def reject(self, name: str, reason: str) -> None:
        """Moves a record called `name` from the documents to what is unusable."""
        file, _, position = name.rpartition(":")
        self.documents -= 1
        self.rejected.append(Rejected(file, int(position), reason))

    def drop(self, reason: str, name: str, digest: str, text: bytes, source: str) -> None:
        """Counts a document that is left out."""
        by_source = self.counts(source).drops
        by_source[reason] = by_source.get(reason, 0) + 1
        shown = self.examples.get(reason, [])
        if len(shown) < EXAMPLES or digest < shown[-1].digest:
            example = Example(
                digest=digest, name=name, text=text[: 4 * _EXAMPLE_CHARS].decode(errors="ignore")[:_EXAMPLE_CHARS]
            )
            self.examples[reason] = lowest_examples([*shown, example])


def lowest_examples(examples: Iterable[Example]) -> list[Example]:
    """The examples that are shown of all those of a reason; independent of their order."""
    return heapq.nsmallest(EXAMPLES, examples, key=lambda e: (e.digest, e.name))
