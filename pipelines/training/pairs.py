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
from configs.prompts import Message


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


def render_pairs(source: Path, target: Path, text: Text, *, row_tokens: int, chat: bool = True) -> int:
    """Renders the pairs of the JSON lines in `source` into `target`.

    With `chat` they go through the chat template; without, a prompt is followed by its completion and the token that
    ends texts. A line holds `prompt` and `completion`, or `messages`, the last of which is the completion.

    Returns how many pairs were left out because they are longer than `row_tokens` + 1 tokens.

    Raises:
        DataError: a line is no pair, or no pair fits.
        ContractError: a prompt's tokens are others once the completion follows.
    """
    rows: list[list[int]] = []
    prompts: list[int] = []
    left_out = text_bytes = 0
    for question, completion in _read(source, chat=chat):
        if isinstance(question, str):
            before = text.encode(question)
            whole = [*text.encode(question + completion), min(text.eos_token_ids)]
        else:
            answer = {"role": "assistant", "content": completion}
            before = text.render_chat(question)
            whole = text.render_chat([*question, answer], add_generation_prompt=False)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ContractError(
                "a prompt's tokens do not stay as they were once the answer follows",
                received=f"{question!r}, then {completion!r}",
                allowed="a chat template whose rendered conversation begins with its rendered prompt"
                if chat
                else "prompts that end where a token ends, and completions that begin with a blank or a line",
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


def _read(source: Path, *, chat: bool) -> Iterator[tuple[str | list[Message], str]]:
    """Prompts and completions; with `chat`, prompts are conversations."""
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                pair = json.loads(line)
                if chat and "messages" in pair:
                    *question, answer = pair["messages"]
                    if not question or answer["role"] != "assistant":
                        raise ValueError("its last message is not an assistant's answer")
                    yield question, answer["content"]
                else:
                    prompt, completion = pair["prompt"], pair["completion"]
                    yield [{"role": "user", "content": prompt}] if chat else prompt, completion
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{source}, line {number}, is no pair: {error!r}",
                    allowed='a JSON object with "prompt" and "completion"'
                    + (', or "messages" of which the last is the assistant\'s' if chat else ""),
                ) from error
