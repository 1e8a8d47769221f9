"""What makes a file's bytes a document.

A document is valid UTF-8, byte for byte as it is in the file: no Unicode normalisation, no change of line ends, so
that the tokens decode to exactly what was read and offsets in reports are offsets in the file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejected:
    """A file that cannot be used: its name below the source's root, the first bad byte, and why."""

    name: str
    offset: int
    reason: str


def decode(name: str, content: bytes) -> str | Rejected:
    """The text of a file, or why it has none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(name, error.start, f"not UTF-8: {error.reason}")
