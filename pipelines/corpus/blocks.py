"""What readers hand on: blocks of documents, and records that could not be read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from configs.schema.corpus import FieldsConfig
from pipelines.corpus.sources import Rejected

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""A role stands beside the special tokens of a chat template, so it may hold nothing that could complete one."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass
class Block:
    """Some documents of one file, in the order they lie in it, as columns."""

    positions: list[int] = field(default_factory=list)
    """Where each is: a byte in the file, after decompression, or a row of a table."""
    texts: list[str] = field(default_factory=list)
    """Empty if the documents are conversations."""
    conversations: list[Conversation] = field(default_factory=list)
    """Empty if the documents are texts."""
    ids: list[str | None] = field(default_factory=list)
    """Empty unless the source maps such a field; likewise the next two."""
    sources: list[str | None] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)


Read = Iterator[Block | Rejected]


def document_field(fields: FieldsConfig) -> str:
    """Name of the field that holds the document."""
    return fields.text if fields.messages is None else fields.messages


def gather(name: str, records: Iterable[tuple[int, Any]], fields: FieldsConfig) -> Read:
    """One block of the usable ones among (position, record as a mapping), after what is wrong with the others.

    A record that the reader could not make is the exception that says why.
    """
    block = Block()
    key, chats, others = document_field(fields), fields.messages is not None, _others(fields, block)
    for position, record in records:
        value = record.get(key) if isinstance(record, dict) else None
        if not chats and type(value) is str:
            block.texts.append(value)
        elif chats and type(value) is list:
            conversation = _conversation(value)
            if isinstance(conversation, str):
                yield Rejected(name, position, f"field {key!r}: {conversation}")
                continue
            block.conversations.append(conversation)
        else:
            yield Rejected(name, position, _why(record, key, "a list of messages" if chats else "text"))
            continue
        block.positions.append(position)
        for field_name, column in others:
            column.append(_label(record.get(field_name)))
    if block.positions:
        yield block


def _conversation(values: list[Any]) -> Conversation | str:
    """The messages, or what is wrong with them."""
    messages: list[Message] = []
    for number, value in enumerate(values):
        role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
        if type(role) is not str or type(content) is not str:
            return f"message {number} is not an object whose role and content are text"
        if not _ROLE.fullmatch(role):
            return f"message {number} has the role {role[:40]!r}, not a word"
        messages.append(Message(role, content))
    return tuple(messages) if messages else "no messages"


def _others(fields: FieldsConfig, block: Block) -> list[tuple[str, list[str | None]]]:
    columns = ((fields.id, block.ids), (fields.source, block.sources), (fields.label, block.labels))
    return [(name, column) for name, column in columns if name is not None]


def _label(value: Any) -> str | None:
    """`value` as text that UTF-8 can hold."""
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _why(record: Any, key: str, wanted: str) -> str:
    if isinstance(record, Exception):
        return str(record)
    if not isinstance(record, dict):
        return f"not an object but {type(record).__name__}"
    if record.get(key) is None:
        return f"no field {key!r}" if key not in record else f"field {key!r} is null"
    return f"field {key!r} holds {type(record[key]).__name__}, not {wanted}"
