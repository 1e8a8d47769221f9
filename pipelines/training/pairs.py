"""Prompt/completion pairs as token rows, rendered once and kept in a file that every worker maps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from actors.text import Text
from configs.errors import ContractError, DataError


class PairRows:
    """Rendered conversations, each with the length of its prompt; `rows[i]` is (token ids, prompt length)."""

    def __init__(self, arrays: dict[str, npt.NDArray[np.int64]]) -> None:
        self._tokens = arrays["tokens"]
        self._starts = arrays["starts"]
        self._prompts = arrays["prompts"]
        self._text_bytes = int(arrays["text_bytes"][0])

    @classmethod
    def open(cls, path: Path) -> Self:
        """The rows that `render_pairs` wrote to `path`."""
        return cls(load_file(path))

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int64], int]:
        return self._tokens[self._starts[index] : self._starts[index + 1]], int(self._prompts[index])

    def length(self, index: int) -> int:
        """Tokens of row `index`, prompt and completion."""
        return int(self._starts[index + 1] - self._starts[index])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.diff(self._starts).max())

    @property
    def targets(self) -> int:
        """Completion tokens of all rows, end tokens included."""
        return len(self._tokens) - int(self._prompts.sum())

    @property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes of completions per completion token."""
        return self._text_bytes / self.targets


def render_pairs(source: Path, target: Path, text: Text, *, row_tokens: int) -> int:
    """Renders the pairs of the JSON lines in `source` through the chat template into `target`.

    Returns how many pairs were left out because they are longer than `row_tokens` + 1 tokens.

    Raises:
        DataError: a line is no pair, or no pair fits.
        ContractError: the chat template rewrites a prompt once it is answered.
    """
    rows: list[list[int]] = []
    prompts: list[int] = []
    left_out = text_bytes = 0
    for prompt, completion in _read(source):
        question = [{"role": "user", "content": prompt}]
        before = text.render_chat(question)
        whole = text.render_chat([*question, {"role": "assistant", "content": completion}], add_generation_prompt=False)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ContractError(
                "the chat template does not keep a prompt as it was once the answer follows",
                allowed="a template whose rendered conversation begins with its rendered prompt",
            )
        if len(whole) > row_tokens + 1:
            left_out += 1
            continue
        rows.append(whole)
        prompts.append(len(before))
        text_bytes += len(completion.encode())
    if not rows:
        raise DataError(
            f"no pair of {source} fits into {row_tokens} tokens",
            received=f"{left_out} longer pairs",
            next_step="shorten prompts (max_prompt_chars) or use a model with a longer context",
        )
    save_file(
        {
            "tokens": np.concatenate([np.array(row, dtype=np.int64) for row in rows]),
            "starts": np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
            "prompts": np.array(prompts, dtype=np.int64),
            "text_bytes": np.array([text_bytes], dtype=np.int64),
        },
        target,
    )
    return left_out


def _read(source: Path) -> Iterator[tuple[str, str]]:
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                pair = json.loads(line)
                prompt, completion = pair["prompt"], pair["completion"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{source}, line {number}, is no pair: {error!r}",
                    allowed='a JSON object with "prompt" and "completion"',
                ) from error
            yield prompt, completion
