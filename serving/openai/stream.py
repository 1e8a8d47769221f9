"""Answers of the OpenAI API: whole, and as server-sent events.

The same pieces make both, so the texts of a stream joined are the text of the whole answer. An error after the first
piece is an event of its own, because the status line has been sent by then; `data: [DONE]` follows only a whole answer.
Events that say something of an answer have ids, from which a stream that was cut goes on (`resume`); its opening and
its end have none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from actors.tools import CallDelta, CallReader, read_calls
from serving.calls import Piece, Refusal
from serving.openai.errors import error_body
from serving.openai.logprobs import chat_logprobs, completion_logprobs
from serving.openai.resume import Begun, Cursor
from serving.timing import Waterfall

logger = logging.getLogger("ray.serve")

DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
BROKEN = Refusal(500, "the answer broke off: the server met an error", "internal_error")


@dataclass(frozen=True)
class Answer(ABC):
    """The frame around the texts of one answer; one of the two subclasses makes what differs."""

    id: str
    created: int
    """Seconds since the epoch."""
    model: str
    fingerprint: str
    choices: int = 1
    """Answers to each prompt."""
    functions: tuple[str, ...] = ()
    """Names of those that may be called."""

    whole_object: str = ""
    chunk_object: str = ""

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed; one piece an index."""
        choices = [{**_common(piece), **self._choice(piece)} for piece in pieces]
        return {**self._frame(self.whole_object, choices), "usage": self.usage(pieces)}

    def chunks(self, pieces: Sequence[Piece], *, include_usage: bool) -> Iterator[dict[str, Any]]:
        """The events of one batch; pieces of one index are joined."""
        for piece in _joined(pieces):
            choice = self._chunk_choice(piece)
            if choice is None:
                continue
            chunk = self._frame(self.chunk_object, [{**_common(piece), **choice}])
            yield {**chunk, "usage": None} if include_usage else chunk

    def usage(self, pieces: Sequence[Piece]) -> dict[str, int]:
        """Tokens over all prompts, each counted once, and answers; one (the last) piece an index."""
        prompt = sum(piece.prompt_tokens for piece in pieces if piece.index % self.choices == 0)
        completion = sum(piece.completion_tokens for piece in pieces)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def opening(self, *, include_usage: bool) -> Iterator[dict[str, Any]]:
        """Events before the first piece."""
        return iter(())

    def closing(self, **fields: Any) -> dict[str, Any]:
        """The last event of a stream that was asked to say more than its texts."""
        return {**self._frame(self.chunk_object, []), **fields}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    @abstractmethod
    def _choice(self, piece: Piece) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choice(self, piece: Piece) -> dict[str, Any] | None:
        """None if there is nothing to say yet."""


@dataclass(frozen=True)
class CompletionAnswer(Answer):
    """Of `/v1/completions`."""

    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = None if piece.scores is None else completion_logprobs(piece.scores)
        return {"text": piece.text, "logprobs": logprobs}

    def _chunk_choice(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece)


@dataclass(frozen=True)
class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"
    readers: dict[int, CallReader] = field(default_factory=dict)
    """Where the calls of each answer are found as it comes."""

    def opening(self, *, include_usage: bool) -> Iterator[dict[str, Any]]:
        """Says who speaks, in each choice."""
        for index in range(self.choices):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            chunk = self._frame(self.chunk_object, [choice])
            yield {**chunk, "usage": None} if include_usage else chunk

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        choice = {"message": message, "logprobs": _chat_logprobs(piece)}
        if piece.convention is not None:
            content, calls = read_calls(piece.convention, self.functions, piece.text)
            if calls:
                message["content"] = content or None
                message["tool_calls"] = [
                    self._call(piece.index, index) | {"function": {"name": name, "arguments": arguments}}
                    for index, (name, arguments) in enumerate(calls)
                ]
                choice |= _ended_by_call(piece)
        return choice

    def _chunk_choice(self, piece: Piece) -> dict[str, Any] | None:
        choice: dict[str, Any] = {"logprobs": _chat_logprobs(piece)}
        if piece.convention is None:
            return {"delta": {"content": piece.text} if piece.text else {}, **choice}
        reader = self.readers.setdefault(piece.index, CallReader(piece.convention, self.functions))
        deltas = [reader.push(piece.text), *([] if piece.finish_reason is None else [reader.flush()])]
        content = "".join(each.content for each in deltas)
        calls = [self._call_delta(piece.index, call) for each in deltas for call in each.calls]
        delta = ({"content": content} if content else {}) | ({"tool_calls": calls} if calls else {})
        if not (delta or piece.scores or piece.finish_reason):
            return None
        return {"delta": delta, **choice, **(_ended_by_call(piece) if reader.calls else {})}

    def _call(self, choice: int, index: int) -> dict[str, Any]:
        """What every call has. Ids have the nine letters that the strictest chat templates want to get back."""
        name = f"{self.id}/{choice}/{index}".encode()
        return {"id": hashlib.blake2b(name).hexdigest()[:9], "type": "function"}

    def _call_delta(self, choice: int, call: CallDelta) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": call.index, **self._call(choice, call.index), "function": function}


def _ended_by_call(piece: Piece) -> dict[str, Any]:
    """An answer with calls that ends by itself is due to be continued with their results."""
    return {"finish_reason": "tool_calls"} if piece.finish_reason == "stop" else {}


def _chat_logprobs(piece: Piece) -> dict[str, Any] | None:
    return None if piece.scores is None else chat_logprobs(piece.scores)


def _common(piece: Piece) -> dict[str, Any]:
    """What all kinds of choice hold."""
    fields = {"index": piece.index, "finish_reason": piece.finish_reason}
    return fields if piece.sampling is None else {**fields, "sampling": piece.sampling.model_dump(mode="json")}


def _by_index(pieces: Sequence[Piece]) -> list[list[Piece]]:
    parts: dict[int, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault(piece.index, []).append(piece)
    return list(parts.values())


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece an index, without those that neither say nor end anything."""
    merged = map(Piece.joined, _by_index(pieces))
    return [piece for piece in merged if piece.text or piece.scores or piece.finish_reason]


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data).encode() + b"\n\n"


def _events(answer: Answer, cursor: Cursor, batch: Sequence[Piece], *, include_usage: bool) -> bytes:
    """The events of a batch, each with the id that a client which has it can go on from."""
    found = b""
    for pieces in _by_index(batch):
        cursor.advance(pieces)
        for chunk in answer.chunks(pieces, include_usage=include_usage):
            found += f"id: {cursor.event_id}\n".encode() + event(chunk)
    return found


async def server_sent_events(
    answer: Answer,
    begun: Begun,
    rest: AsyncGenerator[Sequence[Piece] | Refusal, None],
    *,
    include_usage: bool,
    waterfall: Waterfall | None,
) -> AsyncIterator[bytes]:
    """The body of a streamed answer that has begun; closes `rest` however it ends.

    What the client has of a stream that goes on is not given out again, nor is the answer opened again.
    """
    cursor, had = begun.cursor, begun.had or ()
    last = {piece.index: piece for piece in (*had, *begun.first)}
    for _ in answer.chunks(had, include_usage=False):
        pass  # a call of a function that was half given out goes on from there
    opening = answer.opening(include_usage=include_usage) if begun.had is None else ()
    head = b"".join(map(event, opening)) + _events(answer, cursor, begun.first, include_usage=include_usage)
    async with aclosing(rest):
        try:
            if head:
                yield head
            async for batch in rest:
                if isinstance(batch, Refusal):
                    yield event(error_body(batch))
                    return
                last.update((piece.index, piece) for piece in batch)
                chunks = _events(answer, cursor, batch, include_usage=include_usage)
                if chunks:
                    yield chunks
        except Exception:
            logger.exception("request %s broke off", answer.id)
            yield event(error_body(BROKEN))
            return
    end: dict[str, Any] = {"usage": answer.usage([last[index] for index in sorted(last)])} if include_usage else {}
    if waterfall is not None:
        end["timing_ms"] = {name: round(value, 3) for name, value in waterfall.whole.items()}
    if end:
        yield event(answer.closing(**end))
    yield DONE
