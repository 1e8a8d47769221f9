"""Labelled examples from files: records with a class or a text, sentences of tagged words, and parallel lines.

Texts come from `read_documents`, so they are cleaned, filtered and accounted for as those of any corpus; what does not
make an example goes to quarantine with its place and the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import blake3

from configs.errors import DataError
from configs.schema.corpus import SourceConfig
from configs.schema.examples import Task
from pipelines.corpus.clean import Step, clean, steps
from pipelines.corpus.documents import read_documents
from pipelines.corpus.ledger import ONE_SOURCE, Ledger
from pipelines.corpus.pieces import file_format, plan_spans
from pipelines.corpus.sources import Listing, Rejected
from pipelines.corpus.streams import Stream

LABELS = "labels.json"
"""File that tells the task of a dataset, and the names of its classes by their numbers."""
_SPAN_BYTES = 8 << 20
OUTSIDE = "O"
"""Tag of a word that is in no span."""


@dataclass(frozen=True)
class Example:
    """One example: what a dataset's file says of it, and the digest of its text, which decides its split."""

    digest: str
    name: str
    """File and place it was read from."""
    fields: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """A line of the dataset."""
        return {"id": self.digest[:16], "source": self.name, **self.fields}


@dataclass
class Reading:
    """The examples of a source, in its order, and where everything else went."""

    examples: list[Example] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    def add(self, name: str, position: int, text: str, fields: dict[str, Any] | str) -> None:
        """Takes a document in as an example, or, where `fields` says what is wrong with it, as rejected."""
        if isinstance(fields, str):
            self.ledger.documents -= 1
            self.ledger.rejected.append(Rejected(name, position, fields))
        else:
            digest = blake3.blake3(text.encode()).hexdigest()
            self.examples.append(Example(digest, f"{name}:{position}", fields))


def read_labelled(listing: Listing, config: SourceConfig, task: Task, names: dict[str, str]) -> Reading:
    """Examples of documents that hold their label: a class (called by `names`, if there are any), a text, or tags.

    Raises:
        DataError: a file changed since it was listed.
    """
    reading = Reading()
    for span in plan_spans(listing, config, _SPAN_BYTES):
        for documents in read_documents(listing, span, config, reading.ledger):
            labels: Sequence[str | None] = documents.labels or [None] * len(documents.names)
            for name, content, label in zip(documents.names, documents.texts, labels, strict=True):
                file, _, position = name.rpartition(":")
                text = content.decode()
                made = _tagged(text) if task == "tag" else _labelled(text, label, task, names)
                reading.add(file, int(position), _key(text, made), made)
    return reading


def _key(text: str, made: dict[str, Any] | str) -> str:
    """The text of an example without its labels."""
    return " ".join(made["words"]) if isinstance(made, dict) and "words" in made else text


def _labelled(text: str, label: str | None, task: Task, names: dict[str, str]) -> dict[str, Any] | str:
    if label is None or not label.strip():
        return "no label"
    if task == "seq2seq":
        return {"prompt": text, "completion": label.strip()}
    if names and label not in names:
        return f"label {label!r} has no name in labels"
    return {"text": text, "label": names.get(label, label)}


def _tagged(sentence: str) -> dict[str, Any] | str:
    """The words of a sentence and their tags, spans begun with B-."""
    words: list[str] = []
    tags: list[str] = []
    for line in sentence.split("\n"):
        columns = line.split("\t") if "\t" in line else line.split()
        if len(columns) < 2 or not columns[0].strip():
            return f"no word and tag in the line {line[:40]!r}"
        word, tag = columns[0].strip(), columns[-1].strip()
        if tag != OUTSIDE and tag[:2] not in ("B-", "I-"):
            return f"tag {tag[:40]!r} is neither {OUTSIDE} nor B-type nor I-type"
        words.append(word)
        tags.append(tag)
    return {"words": words, "tags": begin_spans(tags)}


def begin_spans(tags: Sequence[str]) -> list[str]:
    """Tags in which every span begins with B-, from tags in which some begin with I- (IOB1, IO)."""
    result: list[str] = []
    for before, tag in zip([OUTSIDE, *tags], tags, strict=False):
        begins = tag.startswith("I-") and before[2:] != tag[2:]
        result.append(f"B-{tag[2:]}" if begins else tag)
    return result


def read_parallel(source: tuple[Listing, SourceConfig], target: tuple[Listing, SourceConfig]) -> Reading:
    """Examples of lines and the lines with the same numbers in the files of `target`; files go by their order.

    Pairs with a blank or unreadable side are rejected.

    Raises:
        DataError: the two sides do not have as many files or lines, or a file breaks off or changed.
    """
    reading = Reading()
    sides = [list(_sides(*side)) for side in (source, target)]
    counts = [[(name, len(lines)) for name, lines in side] for side in sides]
    if [count for _, count in counts[0]] != [count for _, count in counts[1]]:
        raise DataError(
            "source and target are not parallel: their files do not have as many lines",
            received="; ".join(", ".join(f"{name} {count}" for name, count in side) for side in counts),
            allowed="files with the same numbers of lines, in the same order",
            next_step="correct source and target in the recipe",
        )
    for (name, lines), (_, others) in zip(*sides, strict=True):
        for number, (text, other) in enumerate(zip(lines, others, strict=True), start=1):
            reading.ledger.documents += 1
            if isinstance(text, UnicodeDecodeError) or isinstance(other, UnicodeDecodeError):
                reading.add(name, number, "", "not UTF-8 on one side")
            elif not text or not other:
                reading.add(name, number, "", "nothing on one side")
            else:
                read = reading.ledger.counts(ONE_SOURCE)
                read.documents_read += 1
                read.read_bytes += len(text.encode())
                reading.add(name, number, text, {"prompt": text, "completion": other})
    return reading


def _sides(listing: Listing, config: SourceConfig) -> Iterator[tuple[str, list[str | UnicodeDecodeError]]]:
    """Each file's lines, cleaned."""
    for file in listing.files:
        with listing.open(file) as opened:
            stream = Stream(opened, file_format(file.name, config)[1])
            content = stream.read(sys.maxsize)
        if stream.failure is not None:
            raise DataError(
                f"{file.name} breaks off: {stream.failure}", next_step="mend the file, or leave it out of the source"
            )
        changes = steps(config.cleaning, file.name)
        yield file.name, [_line(line, changes) for line in content.removesuffix(b"\n").split(b"\n")]


def _line(content: bytes, changes: list[Step]) -> str | UnicodeDecodeError:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error
    return clean(content, changes)[0].decode().strip()


def distinct(examples: Iterable[Example], seen: set[str]) -> list[Example]:
    """The first example of each text and label that is not in `seen`, which learns them."""
    kept = []
    for example in examples:
        key = f"{example.digest} {sorted(example.fields.items())}"
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def label_names(examples: Iterable[Example], task: Task) -> list[str]:
    """Classes in the order of their names; of tags the outside first, then beginning and inside of each type."""
    if task == "classify":
        return sorted({example.fields["label"] for example in examples})
    if task == "seq2seq":
        return []
    types = sorted({tag[2:] for example in examples for tag in example.fields["tags"] if tag != OUTSIDE})
    return [OUTSIDE, *(f"{place}-{kind}" for kind in types for place in "BI")]
