"""What is changed in a document's text before it is judged, hashed and encoded.

Prose is brought to one form: visible text of HTML, characters decoded with the right character set, NFC, lines that end
with a line feed, no control characters. Program source keeps its bytes, because they are its meaning: a string literal
or a test of an editor may hold anything. Personal data is masked in both, where a recipe asks for it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

import ftfy

from configs.schema.corpus import CleaningConfig
from pipelines.corpus.html import visible_text
from pipelines.corpus.masks import MASKS

CODE_ENDINGS = frozenset({
    ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cxx", ".cu", ".rs", ".go", ".java", ".kt",
    ".scala", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".cs", ".swift", ".m",
    ".sh", ".sql", ".hs", ".ml", ".ex", ".erl", ".clj", ".dart", ".v", ".vhdl", ".asm", ".s", ".f90", ".el",
    ".lisp", ".zig", ".nim", ".proto",
})  # fmt: skip
"""Endings of files that hold program source."""

_MOJIBAKE = ("Ã", "Â", "â€", "ï»¿", "ðŸ", "Ð", "Ñ")
"""What UTF-8 read as Latin-1 or Windows-1252 is full of; `ftfy` looks at the lines that hold one, and decides."""
_MOJIBAKE_LEAD = b"\xc3"
"""First byte, in UTF-8, of each of them. Bytes are searched before characters: 1,000 MB/s instead of 25."""
_C0 = bytes(b for b in range(32) if b not in b"\t\n") + b"\x7f"
_C1_LEAD, _BOM = b"\xc2", b"\xef\xbb\xbf"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85]")

Step = Callable[[str], str]


class Cleaner:
    """Applies what a config asks for."""

    def __init__(self, config: CleaningConfig) -> None:
        first = [("html", visible_text)] if config.html else []
        last = [(f"mask_{kind}", MASKS[kind]) for kind in config.mask]
        prose: list[tuple[str, Step]] = []
        if config.mojibake:
            prose.append(("mojibake", repair_mojibake))
        if config.controls:
            prose.append(("controls", remove_controls))
        if config.normalize != "none":
            prose.append(("nfc", normalize))
        self._keeps_code = config.normalize == "auto"
        self._prose: list[tuple[str, Step]] = [*first, *prose, *last]
        self._code: list[tuple[str, Step]] = [*first, *last]

    def steps(self, name: str) -> list[tuple[str, Step]]:
        """The steps, by name, for documents of the file `name`."""
        return self._code if self._keeps_code and is_code(name) else self._prose


def is_code(name: str) -> bool:
    """Whether a file holds program source, by its ending."""
    stem = name.removesuffix(".gz").removesuffix(".zst")
    dot = stem.rfind(".")
    return dot >= 0 and stem[dot:].lower() in CODE_ENDINGS


def normalize(text: str) -> str:
    """Unicode normal form C."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def remove_controls(text: str) -> str:
    """Control characters and byte-order marks removed; every line end, page break and line tabulation a line feed."""
    content = text.encode()
    clear = len(content.translate(None, _C0)) == len(content) and _BOM not in content
    if clear and (_C1_LEAD not in content or not _CONTROL.search(text)):
        return text
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


def repair_mojibake(text: str) -> str:
    """Lines that were decoded with the wrong character set, decoded with the right one."""
    if text.isascii() or _MOJIBAKE_LEAD not in text.encode() or not any(mark in text for mark in _MOJIBAKE):
        return text
    return "".join(_repaired(text))


def _repaired(text: str) -> Iterator[str]:
    for line in text.splitlines(keepends=True):
        yield ftfy.fix_encoding(line) if any(mark in line for mark in _MOJIBAKE) else line
