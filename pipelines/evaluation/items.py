"""The items of a task: records of its files with the prompt, the choices and the right answer that the task makes.

An item's id is the hash of its record, so that it is the same in every order and in every part of the data. A record
that cannot be read, or lacks a field, stops the evaluation: a score over what is left would be another score.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow.parquet as pq

from configs.artifacts import hash_json
from configs.errors import DataError
from configs.prompts import Message
from configs.schema.corpus import SourceConfig
from configs.schema.tasks import Split, Task, TaskData, fill, look_up
from pipelines.corpus.sources import STDLIB, Listing, hash_fraction, list_source
from pipelines.evaluation.functions import read_functions

SplitName = Literal["evaluation", "train"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One thing to be answered."""

    id: str
    fields: Mapping[str, Any]
    """The record."""
    prompt: str
    """What the model reads, without instruction and examples."""
    choices: tuple[str, ...]
    """What it chooses from, in the task's order; empty where it does not choose."""
    label: int | None
    """Which choice is right."""
    references: tuple[str, ...]
    """What is right, the first one what an example shows; empty where nothing is."""

    @property
    def answer(self) -> str:
        """What an example shows as the answer."""
        return self.references[0]


def task_digest(task: Task, *splits: SplitName) -> str:
    """Digest of everything that decides what is asked and how it is scored; not of where the data is.

    Raises:
        DataError: the files of one of `splits` are not there.
    """
    content = task.model_dump(mode="json", exclude={"data": {"evaluation": {"path"}, "train": {"path"}, "get": True}})
    return hash_json([content, [_split_digest(task.data, split) for split in splits]])


def template_digest(task: Task) -> str:
    """Digest of what makes prompts of records: equal templates make equal prompts of equal records."""
    return hash_json(task.model_dump(include={"instruction", "prompt", "delimiter", "separator"}))[:16]


def _split_digest(data: TaskData, split: SplitName) -> str:
    digests = {name: _listing(data, source).digest for name, source in _sources(data, split).items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def load_items(task: Task, split: SplitName = "evaluation") -> list[Item]:
    """The items of a split, in the order of its files.

    Raises:
        DataError: the data is not there, cannot be read, lacks a field that the task names, or holds no record; or the
            right answer is none of the choices.
    """
    seen: Counter[str] = Counter()
    items = []
    for number, (record, digest) in enumerate(_records(task.data, split), start=1):
        seen[digest] += 1
        name = digest[:16] if seen[digest] == 1 else f"{digest[:16]}-{seen[digest]}"
        try:
            items.append(_item(task, name, record))
        except KeyError as error:
            raise DataError(
                f"data.{split}: record {number} has no field that the task's templates name",
                received=str(error.args[0]),
                allowed=", ".join(sorted(record)),
                next_step="correct the template, or the names of the fields",
            ) from None
    if not items:
        raise DataError(
            f"data.{split} holds no record", received=str(_split_of(task.data, split).path),
            allowed="at least one", next_step="correct data.between, data.share or the path",
        )  # fmt: skip
    return items


def content_key(item: Item) -> str:
    """What an item asks, as far as it matters: whatever its case, width and spaces."""
    return " ".join(unicodedata.normalize("NFKC", item.prompt).casefold().split())


def longest_text(item: Item) -> str:
    """The longest text of an item's record: what it is known by among training examples."""
    return max((value for value in item.fields.values() if isinstance(value, str)), key=len, default="")


def full_prompt(task: Task, item: Item, examples: Sequence[Item] = ()) -> str:
    """What a model that continues texts reads: instruction, examples with their answers, and the item's prompt."""
    shown = [f"{example.prompt}{task.delimiter}{example.answer}" for example in examples]
    return task.separator.join([*([task.instruction] if task.instruction else []), *shown, item.prompt])


def full_messages(task: Task, item: Item, examples: Sequence[Item] = ()) -> list[Message]:
    """What a model that talks reads: each example as a user's and an assistant's message, the item as the last user's;
    the instruction at the beginning of the first."""
    turns = [
        {"role": role, "content": content}
        for example in examples
        for role, content in (("user", example.prompt), ("assistant", example.answer))
    ]
    turns.append({"role": "user", "content": item.prompt})
    if task.instruction:
        turns[0]["content"] = task.instruction + task.separator + turns[0]["content"]
    return turns


def _item(task: Task, name: str, record: Record) -> Item:
    choices: tuple[str, ...] = ()
    if isinstance(task.choices, str):
        choices = tuple(str(choice) for choice in look_up(task.choices, record))
    elif task.choices:
        choices = tuple(fill(choice, record) for choice in task.choices)
    references: tuple[str, ...] = ()
    if task.answer is not None:
        references = (fill(task.answer, record),)
    if task.rejected is not None:
        choices = (*references, fill(task.rejected, record))
        return Item(name, record, fill(task.prompt, record), choices, 0, references)
    if task.references is not None:
        found = tuple(str(reference) for reference in look_up(task.references, record))
        references = tuple(dict.fromkeys((*references, *found)))
    label = None
    if choices:
        label = _right(task, record, references, choices, name)
        references = (choices[label],)
    return Item(name, record, fill(task.prompt, record), choices, label, references)


def _right(task: Task, record: Record, references: Sequence[str], choices: Sequence[str], name: str) -> int:
    """Number of the right choice."""
    if task.label is None:
        said, allowed = references[0], ", ".join(map(repr, choices))
        if said in choices:
            return choices.index(said)
    else:
        said, allowed = str(look_up(task.label, record)), f"a number from 0 to {len(choices) - 1}"
        if said.isdecimal() and int(said) < len(choices):
            return int(said)
    raise DataError(
        f"the right answer of item {name} is none of its choices", received=said, allowed=allowed,
        next_step="correct the task's answer, label or choices",
    )  # fmt: skip


def _split_of(data: TaskData, split: SplitName) -> Split:
    found = data.evaluation if split == "evaluation" else data.train
    if found is None:
        raise DataError(
            "the task has no examples to show", allowed="data.train, a split apart from data.evaluation",
            next_step="add data.train to the task's file, or ask without examples",
        )  # fmt: skip
    return found


def _sources(data: TaskData, split: SplitName) -> dict[str, SourceConfig]:
    """The files of a split, by the field that their lines are; one without a name where records have all fields."""
    path = _split_of(data, split).path
    paths = {"": path} if isinstance(path, str) else path
    # Of the standard library what the demo reads of it, of a folder everything.
    return {
        field: SourceConfig(path=place) if place == STDLIB else SourceConfig(path=place, exclude=())
        for field, place in paths.items()
    }


def _records(data: TaskData, split: SplitName) -> Iterator[tuple[Record, str]]:
    """The records of a split, and the digest of each."""
    config = _split_of(data, split)
    low, high = config.share if config.by_file is None else (0.0, 1.0)
    columns = {field: list(_read(data, source, config)) for field, source in _sources(data, split).items()}
    if len({len(column) for column in columns.values()}) > 1:
        raise DataError(
            f"the files of data.{split} do not belong together",
            received=", ".join(f"{field}: {len(column)} lines" for field, column in columns.items()),
            allowed="the same number of lines in each",
        )
    for parts in zip(*columns.values(), strict=True):
        record = parts[0] if "" in columns else {f: part["text"] for f, part in zip(columns, parts, strict=True)}
        if not all(_within(record, field, *bounds) for field, bounds in config.between.items()):
            continue
        if not all(_is(record, field, text) for field, text in config.where.items()):
            continue
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
        digest = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()
        if low <= int(digest[:13], 16) / 16**13 < high:
            yield record, digest


def _within(record: Record, field: str, low: float, high: float) -> bool:
    try:
        return low <= float(look_up(field, record)) <= high
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"between: a record's field {field} is no number",
            received=str(record.get(field)),
            allowed="a field that is a number in every record",
        ) from None


def _is(record: Record, field: str, text: str) -> bool:
    try:
        return str(look_up(field, record)) == text
    except KeyError:
        raise DataError(
            "where: a record has no such field", received=field, allowed=", ".join(sorted(record))
        ) from None


def _listing(data: TaskData, source: SourceConfig) -> Listing:
    try:
        return list_source(source)
    except DataError as error:
        raise DataError(
            f"the task's data is not there: {error.what}", received=source.path, allowed=error.allowed,
            next_step=f"get {data.get}",
        ) from error  # fmt: skip


def _read(data: TaskData, source: SourceConfig, split: Split) -> Iterator[Record]:
    listing = _listing(data, source)
    if data.format == "functions":
        low, high = split.share
        inside = [low <= hash_fraction(split.by_file or "", file.blake3) < high for file in listing.files]
        part = map(listing.read, compress(listing.files, inside))
        others = map(listing.read, compress(listing.files, map(not_, inside)))
        yield from read_functions(part, others)
        return
    for file in listing.files:
        content = listing.read(file)
        try:
            if PurePosixPath(file.name).suffix == ".gz":
                content = gzip.decompress(content)
            yield from _PARSERS[data.format](content, data)
        except (ValueError, EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{source.path}: {file.name} cannot be read as {data.format}: {error}",
                next_step=f"get the file again: {data.get}",
            ) from error


def _jsonl(content: bytes, data: TaskData) -> Iterator[Record]:
    for line in content.split(b"\n"):
        if line.strip():
            yield _mapping(json.loads(line))


def _json(content: bytes, data: TaskData) -> Iterator[Record]:
    yield from _descend(json.loads(content), data.records.split(".") if data.records else [], {})


def _descend(value: Any, path: Sequence[str], outer: Record) -> Iterator[Record]:
    """The records that `path` leads to, with the plain fields of what they lie in."""
    for one in value if isinstance(value, list) else [value]:
        if not path:
            yield {**outer, **_mapping(one)}
        elif path[0] in _mapping(one):
            plain = {key: inner for key, inner in one.items() if not isinstance(inner, list | dict)}
            yield from _descend(one[path[0]], path[1:], {**outer, **plain})
        else:
            raise ValueError(f"there is no {path[0]} among {', '.join(one)}")


def _mapping(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"a record is a mapping, not {type(value).__name__}")
    return value


def _tsv(content: bytes, data: TaskData) -> Iterator[Record]:
    lines = csv.reader(io.StringIO(content.decode()), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = data.columns or tuple(next(lines, ()))
    for line in lines:
        if len(line) != len(columns):
            raise ValueError(f"line {lines.line_num} has {len(line)} columns, not {len(columns)}")
        yield dict(zip(columns, line, strict=True))


def _conll(content: bytes, data: TaskData) -> Iterator[Record]:
    for sentence in re.split(r"\n[ \t]*\n", content.decode().replace("\r\n", "\n")):
        rows = [line.split("\t") if "\t" in line else line.split() for line in sentence.split("\n") if line.strip()]
        if not rows:
            continue
        if any(len(row) < 2 for row in rows):
            raise ValueError(f"a line without a tag in the sentence {sentence[:60]!r}")
        words, tags = [row[0].strip() for row in rows], [row[-1].strip() for row in rows]
        yield {"words": words, "tags": tags, "text": " ".join(words)}


def _parquet(content: bytes, data: TaskData) -> Iterator[Record]:
    yield from pq.read_table(io.BytesIO(content)).to_pylist()


def _lines(content: bytes, data: TaskData) -> Iterator[Record]:
    lines = content.decode().split("\n")
    yield from ({"text": line.removesuffix("\r")} for line in (lines[:-1] if lines[-1] == "" else lines))


def _text(content: bytes, data: TaskData) -> Iterator[Record]:
    text = content.decode()
    if data.begins is None:
        yield {"text": text}
        return
    starts = [match.start() for match in re.finditer(data.begins, text, re.MULTILINE)]
    # What stands before the first beginning belongs to the first document.
    edges = [0, *starts[1:], len(text)]
    yield from ({"text": text[a:b]} for a, b in itertools.pairwise(edges))


_PARSERS = {
    "jsonl": _jsonl, "json": _json, "tsv": _tsv, "conll": _conll, "parquet": _parquet, "lines": _lines, "text": _text,
}  # fmt: skip
