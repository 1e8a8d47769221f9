"""Which tokens may come next in a text that has to have a structure; compiled by llguidance, from tokens' bytes.

Only `structured.Structures` imports this module, once a structure is asked for. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

from actors.detokenizer import Spelling
from actors.text import Text
from configs.errors import EngineError, RequestError
from configs.schema.generation import JSON_STYLE, Structure

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_SHOWN_CHARS = 300
"""Of a message of llguidance, some of which quote whole grammars."""


class Matcher:
    """Follows one text through its structure, token by token."""

    def __init__(self, matcher: LLMatcher, vocab: int, hidden_first: npt.NDArray[np.int32] | None) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._hidden_first = hidden_first
        """Tokens that cannot begin a text, as a mask."""

    @staticmethod
    def masks(matchers: Sequence[Matcher]) -> npt.NDArray[np.int32]:
        """Which tokens may come next in each text, in one pass: bit i % 32 of a row's word i // 32 is token i.

        The texts are of one model.
        """
        result = allocate_token_bitmask(len(matchers), matchers[0]._vocab)
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0]._matcher, result)
        else:
            inner = [(matcher._matcher, row) for row, matcher in enumerate(matchers)]
            fill_next_token_bitmask_par(_executor(), inner, result)
        for row, matcher in enumerate(matchers):
            if matcher._hidden_first is not None:
                result[row] &= ~matcher._hidden_first
        return result

    @property
    def complete(self) -> bool:
        """Whether nothing may follow any more."""
        return self._matcher.is_stopped()

    def copy(self) -> Matcher:
        """Another one at the same place."""
        return Matcher(self._matcher.deep_copy(), self._vocab, self._hidden_first)

    def accept(self, token: int) -> None:
        """Takes the next token, the end token included. Raises `EngineError` if it cannot be taken."""
        self._hidden_first = None
        if not self._matcher.consume_token(token):
            raise EngineError(
                f"the text cannot follow its structure: {_short(self._matcher.get_error())}",
                received=f"token {token}",
                next_step="simplify the structure",
            )


class Grammars:
    """Compiles structures for one tokenizer.

    Raises `RequestError` if a text is not its tokens' bytes one after the other.
    """

    def __init__(self, text: Text) -> None:
        spelling = text.spelling
        if spelling is None:
            raise RequestError(
                "this model's tokenizer cannot be held to a structure: what a token reads depends on its neighbours",
                param="structure",
                allowed="byte-level and SentencePiece-like tokenizers",
                next_step="leave the structure out, or use another model",
            )
        tokens = _Tokens(text, spelling)
        self._hidden_first = (
            _packed([t.startswith(b" ") for t in tokens.tokens]) if spelling.drops_first_space else None
        )
        self._tokenizer = LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.eos)

    def compile(self, structure: Structure) -> Matcher:
        """A matcher at the beginning of a text.

        Raises `RequestError` if the structure is not valid or can never be met.
        """
        try:
            inner = LLMatcher(self._tokenizer, _grammar(structure), log_level=0)
        except (ValueError, RecursionError) as error:
            _refuse(structure, str(error))
        if inner.is_error():
            _refuse(structure, inner.get_error())
        matcher = Matcher(inner, self._tokenizer.vocab_size, self._hidden_first)
        # What cannot be met at all shows when the first token is looked for.
        mask = Matcher.masks([matcher])
        if inner.is_error():
            _refuse(structure, inner.get_error())
        if not mask.any():
            _refuse(structure, "no token of this model's tokenizer can begin it")
        return matcher


class _Tokens:
    """The vocabulary as llguidance reads it.

    Where a model has no end token, one behind the vocabulary stands for it, which no logit belongs to.
    """

    bos_token_id = None

    def __init__(self, text: Text, spelling: Spelling) -> None:
        self._text = text
        ends = [token for token in text.eos_token_ids if token in spelling.tokens]
        size = max(spelling.tokens) + 1
        self.eos = sorted(ends) or [size]
        self.eos_token_id = self.eos[0]
        self.tokens = [spelling.tokens.get(token, b"") for token in range(size)] + [b""] * (not ends)
        self.special_token_ids = sorted(text.special_ids.union(self.eos))
        self._ids: dict[bytes, int] = {}
        for token, spelt in enumerate(self.tokens):
            if spelt and token not in self.special_token_ids:
                self._ids.setdefault(spelt, token)
        self._longest = max(map(len, self._ids))

    def __call__(self, data: bytes) -> list[int]:
        """Tokens of a text that the structure leaves no choice about; the tokenizer's own where they spell it."""
        ids = self._text.encode(data.decode(errors="replace"))
        if b"".join(self.tokens[token] for token in ids) == data:
            return ids
        ids = []
        while data:
            sizes = range(min(self._longest, len(data)), 0, -1)
            size = next((size for size in sizes if data[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids


def _grammar(structure: Structure) -> str:
    """The structure in llguidance's own form. Raises `ValueError` for what is no JSON schema."""
    if structure.json_schema is not None:
        schema = json.loads(structure.json_schema)
        if not isinstance(schema, dict | bool):
            raise ValueError("a JSON schema is an object, true or false")
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        return LLMatcher.grammar_from_json_schema(schema, overrides=cast("JsonCompileOptions", JSON_STYLE))
    if structure.regex is not None:
        return LLMatcher.grammar_from_regex(structure.regex)
    if structure.grammar is not None:
        return LLMatcher.grammar_from_lark(structure.grammar)
    quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in structure.choice or ())
    return LLMatcher.grammar_from_lark(f"start: {quoted}")


def _packed(flags: Sequence[bool]) -> npt.NDArray[np.int32]:
    bits = np.zeros(-(-len(flags) // 32) * 32, dtype=np.uint8)
    bits[: len(flags)] = flags
    return np.packbits(bits, bitorder="little").view(np.int32)


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


def _refuse(structure: Structure, message: str) -> NoReturn:
    (kind,) = (name for name, value in structure if value is not None)
    raise RequestError(
        f"this {kind} cannot be used: {_short(message)}",
        param="structure",
        allowed="what llguidance can hold a text to",
        next_step="change it, or leave it out",
    )


def _short(message: str) -> str:
    """The first line that says something."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 3] + "..."
