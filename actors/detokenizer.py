"""Incremental detokenisation: tokens of one sequence in, text out, never a part of a character.

Byte-level tokenizers (GPT-2's scheme, also Llama 3's and ours) are decoded byte by byte at constant cost a token;
any other through a sliding window over the tokenizer's own `decode`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_WRITTEN_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@cache
def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 bytes stand for themselves, the others for the code points from 256 on, in order; the scheme of
    GPT-2's `bytes_to_unicode`.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def token_bytes(tokenizer: Tokenizer) -> Mapping[int, bytes] | None:
    """Bytes of each token of a byte-level tokenizer; None for any other tokenizer."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    if decoder is None or decoder["type"] != "ByteLevel":
        return None
    table = _byte_of_character()
    result = {}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        try:
            result[token_id] = bytes(map(table.__getitem__, token))
        except KeyError:
            result[token_id] = token.encode()
    return result


@dataclass(frozen=True)
class Spelling:
    """A vocabulary whose texts are its tokens' bytes one after the other, whatever stands beside them."""

    tokens: Mapping[int, bytes]
    """Of every token, special ones by their names."""
    drops_first_space: bool
    """Whether a space at the very beginning of a text is left out."""


def spelling(tokenizer: Tokenizer) -> Spelling | None:
    """How a tokenizer's tokens are spelt; None if that depends on their neighbours (WordPiece) or is not known.

    Byte-level vocabularies, and those of SentencePiece's kind: a mark for each space, bytes written as `<0x0A>`.
    """
    plain = token_bytes(tokenizer)
    if plain is not None:
        return Spelling(plain, drops_first_space=False)
    decoder = json.loads(tokenizer.to_str())["decoder"]
    parts = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    space, drops, has_bytes = None, False, False
    for part in parts:
        match part:
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)}:
                space, drops = mark, scheme != "never"
            case {"type": "Replace", "pattern": {"String": str(mark)}, "content": " "}:
                space = mark
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                drops = True
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"}:
                pass
            case _:
                return None
    if space is None:
        return None
    tokens = {}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        byte = _WRITTEN_BYTE.fullmatch(token) if has_bytes else None
        tokens[token_id] = bytes([int(byte[1], 16)]) if byte else token.replace(space, " ").encode()
    return Spelling(tokens, drops_first_space=drops)


class ByteStream:
    """Decodes byte-level tokens; bytes that are no UTF-8 become U+FFFD, as the tokenizer's `decode` has it."""

    def __init__(self, table: Mapping[int, bytes], special: frozenset[int]) -> None:
        self._table = table
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is complete with this token; special and unknown tokens have none."""
        if token_id in self._special:
            return ""
        return self._decoder.decode(self._table.get(token_id, b""))

    def flush(self) -> str:
        """U+FFFD if a character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """Decodes any tokenizer's tokens by comparing two decodings of the last few.

    The window begins at a token whose text was given out, since a decoder may treat a first token differently
    (a leading space is dropped). Text that ends in U+FFFD is held, as its character may be incomplete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0
        """Tokens at the start of the window whose text was given out."""

    def push(self, token_id: int) -> str:
        """Text that is complete with this token."""
        self._window.append(token_id)
        delta = self._delta()
        if not delta or delta.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return delta

    def flush(self) -> str:
        """What is held, an incomplete character as U+FFFD."""
        return self._delta()

    def _delta(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]


class MarkedStream:
    """Writes some tokens by names of their own; what stands between them is decoded as a text for itself."""

    def __init__(self, names: Mapping[int, str], start: Callable[[], ByteStream | WindowStream]) -> None:
        self._names = names
        self._start = start
        self._stream = start()

    def push(self, token_id: int) -> str:
        """Text that is complete with this token."""
        name = self._names.get(token_id)
        if name is None:
            return self._stream.push(token_id)
        held, self._stream = self._stream.flush(), self._start()
        return held + name

    def flush(self) -> str:
        """What is held, an incomplete character as U+FFFD."""
        return self._stream.flush()
