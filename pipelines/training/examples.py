"""Labelled examples as token rows, encoded once and kept in a file that every worker maps.

A text is framed by the tokenizer's own tokens for that (`[CLS]`, `</s>`); where it has none, by its end-of-text token,
which stands before and behind every document of the corpora made here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from actors.text import CONTRACT, make_contract
from configs.errors import ContractError, DataError
from configs.schema.examples import Task
from pipelines.training.labelled import IGNORED, Ints


class ExampleRows:
    """Encoded examples; `rows[i]` is (token ids, labels)."""

    def __init__(self, arrays: Mapping[str, Ints]) -> None:
        self._tokens, self._starts = arrays["tokens"], arrays["starts"]
        self._labels, self._label_starts = arrays["labels"], arrays["label_starts"]
        self._lines = arrays["lines"]
        self.truncated = int(arrays["truncated"][0])
        """Examples that were cut to fit."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """The rows that `encode_examples` wrote to `path`."""
        return cls(load_file(path))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[Ints, Ints]:
        labels = self._labels[self._label_starts[index] : self._label_starts[index + 1]]
        return self._tokens[self._starts[index] : self._starts[index + 1]], labels

    def length(self, index: int) -> int:
        """Tokens and labels of row `index`: what it costs."""
        tokens = self._starts[index + 1] - self._starts[index]
        return int(tokens + self._label_starts[index + 1] - self._label_starts[index])

    def line(self, index: int) -> int:
        """Where row `index` stands in the dataset's file, from 1."""
        return int(self._lines[index])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.diff(self._starts).max())

    @property
    def targets(self) -> int:
        """Labels that are predicted."""
        return int((self._labels != IGNORED).sum())


@dataclass(frozen=True)
class Framing:
    """A tokenizer, and the tokens it puts around a text."""

    tokenizer: Tokenizer
    begin: int | None
    """Token before a text; of an encoder the place it is classified by."""
    end: int
    """Token behind a text."""

    @classmethod
    def load(cls, folder: Path, *, classified: bool) -> Self:
        """Reads a tokenizer or model folder; with `classified` there is always a token before the text.

        Raises:
            ContractError: the tokenizer names no token that ends a text.
        """
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        path = folder / "tokenizer_config.json"
        named = json.loads(path.read_bytes()) if path.is_file() else {}

        def find(*names: str) -> int | None:
            values = (named.get(name) for name in names)
            contents = [value["content"] if isinstance(value, dict) else value for value in values if value]
            return tokenizer.token_to_id(contents[0]) if contents else None

        end = find("sep_token", "eos_token")
        if end is None:
            raise ContractError(
                f"the tokenizer in {folder} names no token that ends a text",
                allowed="sep_token or eos_token in tokenizer_config.json",
                next_step="use a tokenizer made by the tokenizer stage, or name the token",
            )
        begin = find("cls_token", "bos_token")
        return cls(tokenizer, end if begin is None and classified else begin, end)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it stands; special tokens' names in it are ordinary characters."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def frame(self, ids: Sequence[int], limit: int) -> tuple[list[int], bool]:
        """`ids` between the framing tokens, at most `limit` long, and whether some were left out."""
        first = [] if self.begin is None else [self.begin]
        room = limit - len(first) - 1
        return [*first, *ids[:room], self.end], len(ids) > room

    def write(self, folder: Path) -> None:
        """Makes the tokenizer in `folder` put these tokens around texts by itself, and the contract beside it say so.

        One that has a post-processor puts its own. So what a model was trained to read is what everybody gives it.
        """
        path = folder / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
        if tokenizer.post_processor is not None:
            return
        used = {token: tokenizer.id_to_token(token) for token in (self.begin, self.end) if token is not None}
        first = "" if self.begin is None else f"{used[self.begin]} "
        last = used[self.end]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{first}$A {last}",
            pair=f"{first}$A {last} $B {last}",
            special_tokens=[(name, token) for token, name in used.items()],
        )
        tokenizer.save(str(path))
        if (folder / CONTRACT).exists():
            (folder / CONTRACT).write_text(make_contract(folder).model_dump_json(indent=2) + "\n", encoding="utf-8")


def encode_examples(
    source: Path, target: Path, framing: Framing, *, task: Task, labels: Sequence[str], row_tokens: int
) -> None:
    """Encodes the JSON lines in `source` into `target`; rows longer than `row_tokens` are cut.

    Raises:
        DataError: a line is no example of `task`, or there is none.
    """
    encoder = _Encoder(framing, {label: number for number, label in enumerate(labels)}, row_tokens)
    encode = {"classify": encoder.classified, "tag": encoder.tagged, "seq2seq": encoder.translated}[task]
    tokens: list[list[int]] = []
    targets: list[list[int]] = []
    for number, record in read_examples(source):
        try:
            row, label = encode(record)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{source}, line {number}, is no example of task {task}: {error!r}",
                next_step="make the dataset with an examples stage of the same task",
            ) from error
        tokens.append(row)
        targets.append(label)
    if not tokens:
        raise DataError(f"{source} holds no examples", next_step="take more data, or another split")
    save_file(
        {
            "tokens": np.concatenate(tokens).astype(np.int64),
            "starts": np.cumsum([0, *map(len, tokens)]).astype(np.int64),
            "labels": np.concatenate(targets).astype(np.int64),
            "label_starts": np.cumsum([0, *map(len, targets)]).astype(np.int64),
            "lines": np.arange(1, len(tokens) + 1, dtype=np.int64),
            "truncated": np.array([encoder.truncated], dtype=np.int64),
        },
        target,
    )


def read_examples(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a dataset's file, numbered from 1."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, json.loads(line)


class _Encoder:
    """Records to (token ids, labels)."""

    def __init__(self, framing: Framing, numbers: Mapping[str, int], row_tokens: int) -> None:
        self._framing = framing
        self._numbers = numbers
        self._row_tokens = row_tokens
        self._words: dict[str, list[int]] = {}
        self.truncated = 0

    def classified(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        return self._row(self._framing.encode(record["text"])), [self._numbers[record["label"]]]

    def translated(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        source = self._row(self._framing.encode(record["prompt"]))
        target = self._framing.encode(record["completion"])
        self.truncated += len(target) > self._row_tokens - 1
        return source, [*target[: self._row_tokens - 1], self._framing.end]

    def tagged(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The first token of a word carries its tag; a word that the tokenizer drops carries none."""
        ids: list[int] = []
        tags: list[int] = []
        for word, tag in zip(record["words"], record["tags"], strict=True):
            pieces = self._word(word if not ids else f" {word}")
            ids += pieces
            tags += [self._numbers[tag], *[IGNORED] * (len(pieces) - 1)][: len(pieces)]
        row = self._row(ids)
        lead = [] if self._framing.begin is None else [IGNORED]
        return row, [*[*lead, *tags][: len(row) - 1], IGNORED]

    def _word(self, word: str) -> list[int]:
        if word not in self._words:
            self._words[word] = self._framing.encode(word)
        return self._words[word]

    def _row(self, ids: Sequence[int]) -> list[int]:
        row, cut = self._framing.frame(ids, self._row_tokens)
        self.truncated += cut
        return row
