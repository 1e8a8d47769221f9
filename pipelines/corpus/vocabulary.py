"""Existing tokenizers taken over as they are, and how well a tokenizer fits a text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from actors.store.artifacts import file_blake3
from configs.artifacts import hash_json
from configs.errors import ContractError
from pipelines.corpus.encode import Encoder

_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What a tokenizer is, of all that lies in a model folder."""


def existing_digest(folder: Path) -> str:
    """Digest of the tokenizer files in `folder`. Raises `ContractError` if there is no tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        raise ContractError(
            "existing tokenizer has no tokenizer.json",
            received=str(folder),
            allowed="the folder of a fast Hugging Face tokenizer",
            next_step="save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return hash_json([[name, file_blake3(folder / name)] for name in _FILES if (folder / name).is_file()])


def copy_existing(folder: Path, target: Path, end_of_text: str | None) -> None:
    """Copies the tokenizer in `folder`; `end_of_text`, if given, becomes its eos_token.

    Raises:
        ContractError: there is no tokenizer.json, or nothing says which token ends a text.
    """
    existing_digest(folder)
    for name in _FILES:
        if (folder / name).is_file():
            (target / name).write_bytes((folder / name).read_bytes())
    path = target / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    if end_of_text is not None or not path.is_file():
        named = {} if end_of_text is None else {"eos_token": end_of_text}
        path.write_text(json.dumps({**config, **named}, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    try:
        Encoder.load(target, "tokenizers")
    except ContractError as error:
        raise ContractError(
            f"the tokenizer in {folder} cannot end a document", received=error.received,
            allowed="a tokenizer with an eos_token, or end_of_text set to one of its tokens",
            next_step="set end_of_text in the recipe, e.g. '[SEP]' for BERT's",
        ) from error  # fmt: skip


def unknown_id(folder: Path) -> int | None:
    """Id that the tokenizer in `folder` gives for what it does not know; None if it knows everything."""
    description = json.loads((folder / "tokenizer.json").read_bytes())
    model = description["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else Tokenizer.from_str(json.dumps(description)).token_to_id(token)


@dataclass(frozen=True)
class Fit:
    """What encoding some text gave."""

    documents: int
    text_bytes: int
    words: int
    """Runs of characters that are not white space."""
    tokens: int
    unknown: int
    """Tokens that stand for something unknown."""

    def __add__(self, other: Fit) -> Fit:
        return Fit(
            self.documents + other.documents,
            self.text_bytes + other.text_bytes,
            self.words + other.words,
            self.tokens + other.tokens,
            self.unknown + other.unknown,
        )

    def figures(self) -> dict[str, float]:
        """Rounded: bytes a token, share of unknown tokens, tokens a word (fertility)."""
        tokens, words = max(self.tokens, 1), max(self.words, 1)
        return {
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "bytes_per_token": round(self.text_bytes / tokens, 4),
            "unknown_rate": round(self.unknown / tokens, 6),
            "fertility": round(self.tokens / words, 4),
        }


def measure(encoder: Encoder, texts: Iterable[str], unknown: int | None) -> Fit:
    """Encodes `texts` and counts."""
    total = Fit(0, 0, 0, 0, 0)
    for text in texts:
        ids = encoder.encode(text)
        missed = 0 if unknown is None else int(np.count_nonzero(ids == unknown))
        total += Fit(1, len(text.encode()), len(text.split()), len(ids), missed)
    return total


def escaping_specials(folder: Path, encoder: Encoder, unknown: int | None) -> list[str]:
    """Special tokens, other than the unknown one, that their own name in a document would become.

    None of ours; some existing tokenizers hold them among their pieces (T5's `</s>`).
    """
    added = json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]
    return [
        token["content"]
        for token in added
        if token["special"] and token["id"] != unknown and token["id"] in encoder.encode(f"a {token['content']} b")
    ]
