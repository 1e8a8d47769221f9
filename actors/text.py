"""Text to token ids and back: tokenizer, chat template and special tokens of one folder, and the contract over them.

Guarantees: what a message or a prompt says is never taken for a special token; `decode` of all ids equals the
concatenation of what `stream_decoder` gave out; no part of a UTF-8 sequence is ever given out. Needs neither torch
nor Ray. A folder without `tokenizer.json` (slow tokenizers) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

from tokenizers import Encoding, Tokenizer

from actors.chat_template import ChatTemplate, Message, respelt, strings
from actors.detokenizer import ByteStream, MarkedStream, Spelling, WindowStream, spelling, token_bytes
from actors.tools import Convention
from configs.artifacts import TextContract, hash_json
from configs.errors import ContractError, RequestError

CONTRACT = "contract.json"
_LONG = 1 << 15
"""Characters, which take some 30 ms."""
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"

_GOLDEN = (
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
    "  leading spaces,\ttabs\r\nand trailing  ",
    "naïve café Ω 漢字 🦉👩\u200d🚀",
    "<|endoftext|> <s> [CLS] are text here 0123456789",
)
_GOLDEN_CHATS = (
    (("user", "What does os.path.join do?"),),
    (("user", "Sum 1 and 2."), ("assistant", "3"), ("user", " And <|end|> 4? ")),
)


class StreamDecoder(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is known; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is still held at the end; an incomplete character becomes U+FFFD."""
        ...


@dataclass(frozen=True)
class ModelInput:
    """A text, or a pair of them, as an encoder reads it: with the tokens that the tokenizer puts around it.

    One entry a token; a token that was put in has no word and no characters.
    """

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    """0 in the first text, 1 in the second, where the model tells them apart."""
    words: tuple[int | None, ...]
    """Which word of its text a token is part of."""
    offsets: tuple[tuple[int, int], ...]
    """Where in its text the token's characters begin and end."""
    truncated: bool = False
    """Whether tokens were left out to fit a window."""


class Text:
    """Tokenizer, chat template and special tokens of a tokenizer or model folder.

    Made by `Text.load`. Instances do not change and may be shared between threads.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: str | None,
        special: Mapping[str, str],
        eos: frozenset[int],
        contract: TextContract | None,
    ) -> None:
        self.contract = contract
        """The contract that came with the folder and was verified; None where there was none."""
        self.eos_token_ids = eos
        """Tokens that end a text; may be empty."""
        self._tokenizer = tokenizer
        # Added tokens found in this one's input are encoded as the text they are.
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._template = None if template is None else ChatTemplate(template, special)
        self._special = dict(special)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in added.items() if token.special}
        names = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._bytes = token_bytes(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Opens a folder. Raises `ContractError` if it holds no fast tokenizer or breaks its own contract."""
        text = cls._open(folder)
        if text.contract is not None:
            verify_contract(folder, text.contract)
        return text

    @classmethod
    def _open(cls, folder: Path) -> Self:
        path = folder / _TOKENIZER
        if not path.is_file():
            raise ContractError(
                f"no {_TOKENIZER} in {folder}",
                allowed="a tokenizer or model folder with a fast tokenizer",
                next_step="save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ContractError(f"{path} is not a tokenizer: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = _read_json(folder / _TOKENIZER_CONFIG)
        contract = folder / CONTRACT
        return cls(
            tokenizer,
            template=_read_template(folder, config),
            special=_special_tokens(config),
            eos=_eos_ids(folder, tokenizer, config),
            contract=TextContract.model_validate_json(contract.read_bytes()) if contract.is_file() else None,
        )

    @property
    def vocab_size(self) -> int:
        """Ids run below this; added tokens are counted."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Token that begins a text, if the tokenizer names one."""
        return self._special_id("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Token that fills rows up, if the tokenizer names one."""
        return self._special_id("pad_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can be used."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it stands: nothing added, special tokens' names in it are ordinary characters."""
        return _encoding(self._plain, text, None, add_special_tokens=False).ids

    def encode_input(self, text: str, pair: str | None = None, *, window: int | None = None) -> ModelInput:
        """What an encoder reads for a text: special tokens' names in it are ordinary characters.

        Args:
            text: any text.
            pair: a second one, for models that judge two together.
            window: tokens to fit into; the ends of the texts are left out, the longer one's first.
        """
        encoding = _encoding(self._plain, text, pair, add_special_tokens=True)
        sides: tuple[list[int], list[int]] = ([], [])
        for index, side in enumerate(encoding.sequence_ids):
            if side is not None:
                sides[side].append(index)
        dropped: set[int] = set()
        excess = 0 if window is None else len(encoding) - window
        for _ in range(min(excess, sum(map(len, sides)))):
            dropped.add(max(sides, key=len).pop())
        kept = [index for index in range(len(encoding)) if index not in dropped]
        return ModelInput(
            token_ids=_picked(encoding.ids, kept),
            type_ids=_picked(encoding.type_ids, kept),
            words=_picked(encoding.word_ids, kept),
            offsets=_picked(encoding.offsets, kept),
            truncated=bool(dropped),
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes: a special token's are its name's; of a token that does not exist there are none."""
        if self.spelling is not None:
            return self.spelling.tokens.get(token_id, b"")
        return (self._tokenizer.id_to_token(token_id) or "").encode()

    @cached_property
    def spelling(self) -> Spelling | None:
        """The bytes that tokens add to a text; None if these depend on the neighbours."""
        return spelling(self._tokenizer)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no part of a text."""
        return frozenset(self._special_ids.values())

    def special_id(self, name: str) -> int | None:
        """The special token of this name; None if there is none."""
        return self._special_ids.get(name)

    def stream_decoder(self, spelt: frozenset[int] = frozenset()) -> StreamDecoder:
        """A decoder for one new sequence; the special tokens in `spelt` are written by their names."""
        if spelt:
            names = {token: name for name, token in self._special_ids.items() if token in spelt}
            return MarkedStream(names, self._plain_decoder)
        return self._plain_decoder()

    def _plain_decoder(self) -> ByteStream | WindowStream:
        if self._bytes is not None:
            return ByteStream(self._bytes, frozenset(self._special_ids.values()))
        return WindowStream(self.decode)

    @property
    def tool_convention(self) -> Convention | None:
        """How the model writes calls of tools; None if it has no template, or one that is not known to take tools."""
        return None if self._template is None else self._template.convention

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation under the chat template.

        Special tokens come from the template alone: a special token's name in a message or a tool is encoded as
        ordinary characters. Raises `RequestError` if there is no template or it refuses the messages.
        """
        rendered, marks = self._render_marked(messages, add_generation_prompt, tools)
        if not marks:
            return _encoding(self._tokenizer, rendered, None, add_special_tokens=False).ids
        ids: list[int] = []
        for segment in self._segments(rendered, marks):
            ids.extend(self.encode(segment) if isinstance(segment, str) else (segment,))
        return ids

    def chat_segments(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[str | int]:
        """A conversation under the chat template as runs of ordinary text and, between them, ids of special tokens.

        For encoders other than this one. Raises as `render_chat` does.
        """
        return list(self._segments(*self._render_marked(messages, add_generation_prompt)))

    def _render_marked(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, Mapping[str, str]]:
        """The rendered conversation, and by name the characters that stand for special tokens' names in texts."""
        if self._template is None:
            raise RequestError(
                "this model has no chat template",
                param="messages",
                allowed="text completion",
                next_step="use /v1/completions, or a model whose tokenizer has a chat template",
            )
        contents = "\n".join(strings([messages, tools]))
        named = sorted(set(self._special_pattern.findall(contents)))
        if not named:
            return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools), {}
        # Characters found nowhere in the conversation stand for the names while the template runs.
        unused = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in contents)
        marks = dict(zip(named, unused, strict=False))
        marked = [
            respelt(part, lambda text: self._special_pattern.sub(lambda name: marks[name[0]], text))
            for part in (messages, tools)
        ]
        return self._template.render(marked[0], add_generation_prompt=add_generation_prompt, tools=marked[1]), marks

    def _segments(self, rendered: str, marks: Mapping[str, str]) -> Iterator[str | int]:
        names = str.maketrans({mark: name for name, mark in marks.items()})
        end = 0
        for special in self._special_pattern.finditer(rendered):
            if special.start() > end:
                yield rendered[end : special.start()].translate(names)
            yield self._special_ids[special[0]]
            end = special.end()
        if end < len(rendered):
            yield rendered[end:].translate(names)

    def _special_id(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def fingerprint(self) -> str:
        """Equal for equal tokenizers, templates and special tokens; the hash of the contract."""
        tokenizer = json.loads(self._tokenizer.to_str())
        return hash_json([tokenizer, self._template and self._template.source, self._special])


def make_contract(folder: Path) -> TextContract:
    """The contract of a tokenizer folder, computed from its files.

    Raises `ContractError` if the folder holds no fast tokenizer.
    """
    text = Text._open(folder)
    chats = _GOLDEN_CHATS if text.has_chat_template else ()
    return TextContract(
        hash=text.fingerprint(),
        golden=tuple((prompt, tuple(text.encode(prompt))) for prompt in _GOLDEN),
        golden_chat=tuple((chat, tuple(text.render_chat(_messages(chat)))) for chat in chats),
    )


def verify_contract(folder: Path, contract: TextContract) -> None:
    """Raises `ContractError` unless the tokenizer in `folder` is the one `contract` was made from.

    The golden prompts are compared before the hash, so that the error shows a text that comes out differently.
    """
    text = Text._open(folder)
    for prompt, expected in contract.golden:
        _compare(folder, repr(prompt), text.encode(prompt), expected)
    for chat, expected in contract.golden_chat:
        if not text.has_chat_template:
            raise _mismatch(folder, "no chat template", "the template the model was trained with")
        _compare(folder, f"the chat {chat!r}", text.render_chat(_messages(chat)), expected)
    found = text.fingerprint()
    if found != contract.hash:
        raise _mismatch(folder, f"hash {found[:12]}", f"hash {contract.hash[:12]}")


def _encoding(tokenizer: Tokenizer, text: str, pair: str | None, *, add_special_tokens: bool) -> Encoding:
    if len(text) + len(pair or "") < _LONG:
        return tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)
    # `encode` keeps the interpreter to itself, for seconds in the case of megabytes; a batch lets other threads run.
    whole = text if pair is None else (text, pair)
    return tokenizer.encode_batch([whole], add_special_tokens=add_special_tokens)[0]


def _picked(values: Sequence[Any], indices: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[index] for index in indices)


def _compare(folder: Path, what: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise _mismatch(folder, f"{what} encoded to {list(found)}", f"{list(expected)}")


def _mismatch(folder: Path, received: str, allowed: str) -> ContractError:
    return ContractError(
        f"the tokenizer in {folder} is not the one its text contract was made from",
        received=received,
        allowed=allowed,
        next_step="use the tokenizer files that were published with the model",
    )


def _messages(chat: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ContractError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ContractError(f"{path} is not a JSON object", received=type(value).__name__)
    return value


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / _TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; older files hold them as objects with a `content`."""
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _eos_ids(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> frozenset[int]:
    """The tokenizer's end token, and those the model folder names: its generation config's before its config's."""
    token = _special_tokens(config).get("eos_token")
    ids = {None if token is None else tokenizer.token_to_id(token)}
    for name in ("generation_config.json", "config.json"):
        named = _read_json(folder / name).get("eos_token_id")
        if named is not None:
            ids.update(named if isinstance(named, list) else [named])
            break
    return frozenset(i for i in ids if i is not None)
