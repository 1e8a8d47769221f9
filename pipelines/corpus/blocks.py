"""What readers hand on: blocks of documents, and records that could not be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from configs.schema.corpus import FieldsConfig
from pipelines.corpus.sources import Rejected


@dataclass
class Block:
    """Some documents of one file, in the order they lie in it, as columns."""

    positions: list[int] = field(default_factory=list)
    """Where each is: a byte in the file, after decompression, or a row of a table."""
    texts: list[str] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    """Empty unless the source maps such a field; likewise the next two."""
    sources: list[str | None] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)


Read = Iterator[Block | Rejected]


def gather(name: str, records: Iterable[tuple[int, Any]], fields: FieldsConfig) -> Read:
    """One block of the usable ones among (position, record as a mapping), after what is wrong with the others.

    A record that the reader could not make is the exception that says why.
    """
    block = Block()
    text_of, others = fields.text, _others(fields, block)
    for position, record in records:
        text = record.get(text_of) if isinstance(record, dict) else None
        if type(text) is not str:
            yield Rejected(name, position, _why(record, text_of))
            continue
        block.positions.append(position)
        block.texts.append(text)
        for field_name, column in others:
            column.append(_label(record.get(field_name)))
    if block.texts:
        yield block


def _others(fields: FieldsConfig, block: Block) -> list[tuple[str, list[str | None]]]:
    columns = ((fields.id, block.ids), (fields.source, block.sources), (fields.label, block.labels))
    return [(name, column) for name, column in columns if name is not None]


def _label(value: Any) -> str | None:
    """`value` as text that UTF-8 can hold."""
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _why(record: Any, text_of: str) -> str:
    if isinstance(record, Exception):
        return str(record)
    if not isinstance(record, dict):
        return f"not an object but {type(record).__name__}"
    if record.get(text_of) is None:
        return f"no field {text_of!r}" if text_of not in record else f"field {text_of!r} is null"
    return f"field {text_of!r} holds {type(record[text_of]).__name__}, not text"
