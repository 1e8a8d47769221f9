"""Words, lines and paragraphs of a batch of documents as flat columns, for rules that count them.

Everything is counted over the flat arrays and summed by document, so a rule costs a few passes in C and no Python
object a word. A word is a run without white space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Runs:
    """Strings that lie one after the other, some for each document."""

    values: Any
    """`pyarrow` array of strings."""
    offsets: Ints
    """Where each document's strings begin; one more than there are documents."""

    @cached_property
    def counts(self) -> Ints:
        """Strings of each document."""
        return np.diff(self.offsets)

    @cached_property
    def documents(self) -> Ints:
        """The document of each string."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def _encoded(self) -> Any:
        return self.values.dictionary_encode()

    @cached_property
    def ids(self) -> Ints:
        """A number for each string, equal for equal strings."""
        return self._encoded.indices.to_numpy().astype(np.int64)

    @cached_property
    def distinct(self) -> Any:
        """The strings by their numbers."""
        return self._encoded.dictionary

    @cached_property
    def chars(self) -> Ints:
        """Characters of each string."""
        return pc.utf8_length(self.distinct).to_numpy().astype(np.int64)[self.ids]

    def spread(self, of_distinct: Any) -> Flags:
        """A flag of each distinct string, for each string."""
        flags: Flags = np.asarray(of_distinct.to_numpy(zero_copy_only=False), dtype=bool)
        return flags[self.ids]

    def sums(self, values: Any) -> Ints:
        """The sum of a value of each string, by document."""
        total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        result: Ints = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return result

    def repeated(self) -> Flags:
        """Whether each string occurred in its document before."""
        return repeated(self.ids.astype(np.uint64) * _MIX + self.documents.astype(np.uint64))


_MIX = np.uint64(0x9E3779B97F4A7C15)


def repeated(keys: npt.NDArray[np.uint64]) -> Flags:
    """Whether each key occurred before."""
    result = np.ones(len(keys), dtype=bool)
    result[np.unique(keys, return_index=True)[1]] = False
    return result


def to_array(texts: Sequence[bytes]) -> Any:
    """Texts in UTF-8 as an Arrow array of strings."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


def split(texts: Any, pattern: str | None) -> Runs:
    """Texts cut at `pattern`, or at white space; strings that are then empty are left out."""
    lists = pc.utf8_split_whitespace(texts) if pattern is None else pc.split_pattern(texts, pattern)
    values, offsets = lists.flatten(), lists.offsets.to_numpy().astype(np.int64)
    visible = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0)
    before = np.concatenate([[0], np.cumsum(np.asarray(visible), dtype=np.int64)])
    return Runs(values.filter(visible), before[offsets])


def share(part: Any, whole: Any) -> Floats:
    """`part / whole`, 0 where `whole` is."""
    whole = np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
