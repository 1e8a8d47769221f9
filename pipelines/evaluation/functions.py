"""Records of what documented functions say and are, from some files of a library and from none of the others.

What a file outside of the part says as well, as libraries repeat themselves, is left out: it is what the stage
`instructions` leaves out of its held-out pairs, so that the part that a corpus holds out gives the same records. Only
files that hold a line in common with the part are parsed for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from configs.schema.corpus import InstructionsConfig, SourceConfig
from pipelines.corpus.instructions import Pair, deduplicate, parse_pairs
from pipelines.corpus.sources import STDLIB

_QUOTES = " \t\r\"'rRuU"
"""What may stand around a docstring's first line."""


def read_functions(part: Iterable[bytes], others: Iterable[bytes]) -> list[dict[str, Any]]:
    """Records with `task` (`summary` or `signature`), `prompt` and `completion`, each once; files that are no Python in
    UTF-8 have none."""
    pairs = [pair for content in part for pair in _pairs(content)]
    lines = {_summary(pair).strip(_QUOTES) for pair in pairs}
    shared = (c for c in others if not lines.isdisjoint(line.strip(_QUOTES) for line in _text(c).split("\n")))
    seen: set[Any] = {(pair.task, pair.prompt) for content in shared for pair in _pairs(content)}
    return [pair.model_dump(include={"task", "prompt", "completion"}) for pair in deduplicate(pairs, seen)]


def _pairs(content: bytes) -> list[Pair]:
    found = parse_pairs("", _text(content), InstructionsConfig(source=SourceConfig(path=STDLIB)))
    return [] if isinstance(found, str) else found


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return ""


def _summary(pair: Pair) -> str:
    return pair.completion if pair.task == "summary" else pair.prompt.partition("\n")[0]
