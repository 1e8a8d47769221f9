"""Conversations to token ids by the tokenizer's chat template, as the served model will see them.

`Text.render_chat` is the truth. With gigatoken as the backend, the runs of text between the template's special tokens
are encoded by it, as long as that gives the same ids: on the golden chats of the text contract when the encoder is
made, and on one conversation in a thousand on the way. The content of a message never becomes a special token.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np

from actors.text import Text
from configs.errors import ContractError
from pipelines.corpus.blocks import Conversation, Message
from pipelines.corpus.encode import Backend, Encoder, Ids, process_encoder


class ChatEncoder:
    """Encodes conversations; like the encoder it works with, one a process."""

    def __init__(self, text: Text, encoder: Encoder, *, by_segments: bool) -> None:
        self._text = text
        self._encoder = encoder
        self._by_segments = by_segments

    @classmethod
    def load(cls, folder: Path, encoder: Encoder, backend: Backend) -> Self:
        """Opens the chat template of the tokenizer in `folder`.

        Raises:
            ContractError: there is none.
        """
        text = Text.load(folder)
        if not text.has_chat_template:
            raise ContractError(
                "source.fields.messages needs a chat template, and the tokenizer has none", received=str(folder),
                allowed="a tokenizer trained here, or an existing one with chat_template.jinja",
                next_step="add the template to the existing tokenizer's folder, or map source.fields.text instead",
            )  # fmt: skip
        made = cls(text, encoder, by_segments=backend == "gigatoken")
        chats = () if text.contract is None else text.contract.golden_chat
        golden = [tuple(Message(*m) for m in chat) for chat, _ in chats]
        return made if all(map(made.agrees, golden)) else cls(text, encoder, by_segments=False)

    def encode(self, conversation: Conversation) -> Ids:
        """The ids of a conversation, without an end-of-text token where the template ends with it.

        Raises:
            RequestError: the template refuses the messages.
        """
        ids = self._fast(conversation) if self._by_segments else self._exact(conversation)
        return ids[:-1] if len(ids) and ids[-1] == self._encoder.end_of_text_id else ids

    def agrees(self, conversation: Conversation) -> bool:
        """Whether the ids are those of the text contract."""
        return not self._by_segments or np.array_equal(self._fast(conversation), self._exact(conversation))

    def _exact(self, conversation: Conversation) -> Ids:
        messages = [m._asdict() for m in conversation]
        return np.array(self._text.render_chat(messages, add_generation_prompt=False), dtype=np.uint32)

    def _fast(self, conversation: Conversation) -> Ids:
        segments = self._text.chat_segments([m._asdict() for m in conversation], add_generation_prompt=False)
        encode = self._encoder.encode
        parts = [encode(s) if isinstance(s, str) else np.array([s], dtype=np.uint32) for s in segments]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)


@lru_cache(maxsize=1)
def process_chat(folder: Path, backend: Backend) -> ChatEncoder:
    """The one chat encoder that this process keeps. Raises as `ChatEncoder.load` does."""
    return ChatEncoder.load(folder, process_encoder(folder, backend), backend)
