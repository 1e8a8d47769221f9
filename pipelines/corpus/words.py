"""Text to token ids a word at a time: each word is encoded once and then remembered.

For tokenizers that split text into whole words as ours do and give a word the same ids wherever it stands: WordPiece,
Unigram and word-level ones. Text is first cut at spaces between two visible characters, which no word crosses, and
what comes between two cuts is remembered too. Only what is written in `_SETTLED` characters is split here: about the
others releases of Unicode differ, and `tokenizers` is asked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pipelines.corpus.tokenizer import WHOLE_WORDS

_CUT: Final = re.compile(r" (?<=[\w!-~] )(?=[\w!-~])")
_SPACES: Final = "\t\n\v\f\r \x85\xa0\u2000-\u200a\u2028\u2029\u202f\u205f"
_SETTLED: Final = [chr(code) for code in (*range(0x530), *range(0x1E00, 0x2C00))]
"""Latin, Greek, Cyrillic, punctuation and symbols."""


def _settled(kinds: str) -> str:
    """The settled characters whose Unicode category begins with one of `kinds`, for a set in a pattern."""
    return "".join(re.escape(c) for c in _SETTLED if unicodedata.category(c)[0] in kinds)


_LETTERS, _NUMBERS = _settled("LM"), _settled("N")
_WORD: Final = re.compile(
    f" ?[{_LETTERS}]+| ?[{_NUMBERS}]{{1,3}}| ?[^{_SPACES}{_LETTERS}{_NUMBERS}]|\n"
    f"|(?:(?!\n)[{_SPACES}])+(?![^{_SPACES}])|[{_SPACES}]"
)
"""`WHOLE_WORDS`, in the terms of this module."""
_UNSETTLED: Final = re.compile("[^\0-\u052f\u1e00-\u2bff]")
_LONGEST_KEPT: Final = 32
"""Characters; longer words and stretches hardly come again."""
_KEPT: Final = 1 << 18
"""Entries that are remembered, some 60 MB of them; then all are forgotten."""


def splits_whole_words(description: Mapping[str, Any]) -> bool:
    """Whether a tokenizer (its tokenizer.json) takes text as it is and splits it into whole words, and no further token
    lies across them."""
    split = {"type": "Split", "pattern": {"Regex": WHOLE_WORDS}, "behavior": "Isolated", "invert": False}
    return (
        description.get("normalizer") is None
        and description.get("pre_tokenizer") == split
        and description["model"]["type"] in ("WordPiece", "Unigram", "WordLevel")
        and all(token["special"] for token in description["added_tokens"])
    )


class WordEncoder:
    """Encodes with a tokenizer that `splits_whole_words`; one thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._words = _Words(tokenizer)
        self._stretches = _Stretches(self._words)

    def encode(self, content: bytes) -> npt.NDArray[np.uint32]:
        """The ids of a text (UTF-8)."""
        first, *stretches = _CUT.split(content.decode())
        ids = b"".join([self._words.encode(first), *map(self._stretches.__getitem__, stretches)])
        return np.frombuffer(ids, dtype=np.uint32)


class _Remembered(dict[str, bytes]):
    """Token ids (u32) by text."""

    def keep(self, text: str, ids: bytes) -> bytes:
        if len(text) <= _LONGEST_KEPT:
            if len(self) >= _KEPT:
                self.clear()
            self[text] = ids
        return ids


class _Words(_Remembered):
    """The ids of whole words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._model = tokenizer.model

    def __missing__(self, word: str) -> bytes:
        return self.keep(word, _packed([token.id for token in self._model.tokenize(word)]))

    def encode(self, text: str) -> bytes:
        """The ids of a text that begins and ends with whole words."""
        if _UNSETTLED.search(text):
            return _packed(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return b"".join(map(self.__getitem__, _WORD.findall(text)))


def _packed(ids: list[int]) -> bytes:
    return np.array(ids, dtype=np.uint32).tobytes()


class _Stretches(_Remembered):
    """The ids of what stands between two cuts, with the space before it."""

    def __init__(self, words: _Words) -> None:
        super().__init__()
        self._words = words

    def __missing__(self, stretch: str) -> bytes:
        return self.keep(stretch, self._words.encode(f" {stretch}"))
