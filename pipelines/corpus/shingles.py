"""Hashes of words and of runs of words, the same in every process.

A word is a run of letters, digits and underscores (`\\w`), lower-cased; what is between words does not count.
Near-duplicates and contamination are both found by the 64-bit hashes of runs of words (n-grams). Everything is numpy
over the bytes of a text: no Python object a word.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_WORD: Final = re.compile(r"\w+")
_FOREIGN_MARK: Final = re.compile(r"[^\w\x00-\x7f]")
_BASE: Final = 0x9E3779B97F4A7C15
_PIECE_BYTES = 1 << 18
"""Text that is hashed at a time, so that memory does not grow with the document."""
_IN_WORD: Final = np.array([byte >= 0x80 or chr(byte).isalnum() or byte == ord("_") for byte in range(256)])


def split_words(text: str) -> list[str]:
    """The words of `text`, in order."""
    return _WORD.findall(text.lower())


def word_hashes(text: bytes) -> Hashes:
    """Hash of each word of `text` (UTF-8), in order."""
    content = text.lower() if text.isascii() else _FOREIGN_MARK.sub(" ", text.decode().lower()).encode()
    pieces = []
    begin = 0
    while begin < len(content):
        end = min(begin + _PIECE_BYTES, len(content))
        while end < len(content) and _IN_WORD[content[end]]:
            end += 1
        pieces.append(_hash_words(np.frombuffer(content, dtype=np.uint8, count=end - begin, offset=begin)))
        begin = end
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint64)


def _hash_words(values: npt.NDArray[np.uint8]) -> Hashes:
    """A polynomial in each word's bytes modulo 2**64, from sums over all bytes: the sum up to the word's end less that
    up to its start, divided by the base's power at its start."""
    edges = np.diff(_IN_WORD[values], prepend=False, append=False)
    starts, ends = np.flatnonzero(edges).reshape(-1, 2).T
    powers, inverses = _powers(1 << max(12, len(values).bit_length()))
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum((values.astype(np.uint64) + np.uint64(1)) * powers[: len(values)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


@lru_cache(maxsize=8)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Powers of the base and of its inverse modulo 2**64, from 0 to `count` - 1."""
    inverse = pow(_BASE, -1, 1 << 64)
    steps = [np.full(count, step, dtype=np.uint64) for step in (_BASE, inverse)]
    for powers in steps:
        powers[0] = 1
    first, second = (np.cumprod(powers, dtype=np.uint64) for powers in steps)
    return first, second


def ngrams(words: Hashes, size: int) -> Hashes:
    """Hash of every run of `size` words, well mixed: [max(0, len(words) - size + 1)].

    MinHash needs the mixing: without it 40 % more pairs fell together than should.
    """
    return mix(runs(words, size))


def runs(words: Hashes, size: int) -> Hashes:
    """A number for every run of `size` words that tells runs apart, and that `lengthen` can go on from."""
    count = max(0, len(words) - size + 1)
    numbers = np.zeros(count, dtype=np.uint64)
    for place in range(size if count else 0):
        numbers *= np.uint64(_BASE)
        numbers += words[place : place + count]
    return numbers


def lengthen(numbers: Hashes, words: Hashes, starts: npt.NDArray[np.int64], size: int, target: int) -> Hashes:
    """The numbers of the runs of `target` words that begin at `starts`, given those of the runs of `size` words."""
    for place in range(size, target):
        numbers = numbers * np.uint64(_BASE) + words[starts + place]
    return numbers


def fold(values: Hashes) -> Hashes:
    """One hash for each row of the last axis, in which the order counts: [..., n] to [...]."""
    total = np.zeros(values.shape[:-1], dtype=np.uint64)
    for place in range(values.shape[-1]):
        total *= np.uint64(_BASE)
        total += values[..., place]
    return mix(total)


def mix(values: Hashes) -> Hashes:
    """A bijection of 64 bits in which every bit depends on every other (SplitMix64; Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
