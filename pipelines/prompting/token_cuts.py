"""How tokenizers cut a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer

from actors.text import Text

_LONG_BLANK = re.compile(" {5,}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CutToken(_Record):
    """One token of a text."""

    id: int
    piece: str
    """How the vocabulary spells it."""
    bytes_hex: str
    """What it adds to the text; where that depends on its neighbours (WordPiece), the characters it stands for."""
    begin: int
    end: int
    """The characters of the text that it is made of; tokens of one character that was cut have the same."""
    added: bool
    """Put around the text by the tokenizer, and made of none of it."""


class TextCut(_Record):
    """A text as one tokenizer cuts it."""

    tokens: tuple[CutToken, ...]
    characters: int
    size_bytes: int
    """Of the text in UTF-8."""
    vocabulary: int
    restored: bool
    """Whether the tokens decode to the very text."""

    @property
    def bytes_per_token(self) -> float:
        """Of the tokens that the text is made of; 0 for an empty text."""
        own = sum(not token.added for token in self.tokens)
        return self.size_bytes / own if own else 0.0


def cut_text(folder: Path, text: str) -> TextCut:
    """Cuts a text with the tokenizer of a folder, with what it puts around a text.

    Special tokens' names in the text are ordinary characters. Raises `ContractError` for a folder without a tokenizer.
    """
    opened = Text.load(folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
    read = opened.encode_input(text)
    tokens = tuple(
        CutToken(
            id=token,
            piece=vocabulary.id_to_token(token) or "",
            bytes_hex=_spelt(opened, token, text[begin:end]).hex(),
            begin=begin,
            end=end,
            added=word is None,
        )
        for token, word, (begin, end) in zip(read.token_ids, read.words, read.offsets, strict=True)
    )
    own = [token.id for token in tokens if not token.added]
    return TextCut(
        tokens=tokens,
        characters=len(text),
        size_bytes=len(text.encode()),
        vocabulary=opened.vocab_size,
        restored=opened.decode(own) == text,
    )


def shown_pieces(cut: TextCut, text: str) -> Sequence[tuple[str, bool]]:
    """The text in runs of characters, and whether more than one token makes up a run (a character that was cut)."""
    runs: list[tuple[str, bool]] = []
    last = (0, 0)
    for token in cut.tokens:
        if token.added:
            continue
        if (token.begin, token.end) == last and runs:
            runs[-1] = (runs[-1][0], True)
        else:
            runs.append((text[token.begin : token.end], False))
        last = (token.begin, token.end)
    return runs


def _spelt(text: Text, token: int, characters: str) -> bytes:
    return text.token_bytes(token) if text.spelling is not None else characters.encode()


def visible(text: str, longest: int = 24) -> str:
    """A token as it can be read in a table or picture: spaces, line ends and tabs as signs, cut where too long."""
    shown = _LONG_BLANK.sub(lambda run: f"·*{len(run[0])}", text)
    shown = shown.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown) or "∅"
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
