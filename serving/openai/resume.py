"""Streams that were cut, and go on: the ids of events, and what comes after an event.

An event's id (`Last-Event-ID` of the standard for server-sent events) is all the state there is, so that any ingress
goes on with what another one began, after a restart or an update too if the model is the same. It holds the answer's
own id, from which seeds that were not given follow, and how far each text had come. The answer is written once more
from its beginning, as its tokens are a function of model, request and seed, and what follows the event is given out.
That takes the time of what the client has already; to hold that in each id instead would let ids grow with the answer.

Ids are checked, not signed: their form, against the request, against the model and, by a checksum, against the tokens
that are written again. One that is made up says nothing that its maker could not ask for with a seed.
"""

from __future__ import annotations

import re
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Self
from zlib import crc32

from pydantic import BaseModel

from serving.calls import Call, Piece, Refusal, ServedModel, fingerprint
from serving.openai.body import short

HEADER = "Last-Event-ID"
_EVENT_ID = re.compile(
    r"(?P<call>(?:chat)?cmpl-[0-9a-f]{32})\.(?P<created>[0-9]{1,12})\.(?P<fingerprint>fp_[0-9a-f]{16})"
    r"\.(?P<asked>[0-9a-f]{16})\.(?P<steps>[0-9]{1,9}(?:-[0-9]{1,9})*)\.(?P<written>[0-9a-f]{8})"
)
_ANEW = "next: send the request again without Last-Event-ID"


@dataclass(frozen=True)
class Source:
    """What a stream is the answer of."""

    call_id: str
    """Of the answer."""
    created: int
    """When the answer was begun, seconds since the epoch."""
    fingerprint: str
    """Of the model that writes it."""
    asked: str
    """Digest of the request."""

    def __str__(self) -> str:
        return f"{self.call_id}.{self.created}.{self.fingerprint}.{self.asked}"


@dataclass(frozen=True)
class EventId:
    """What the id of an event says."""

    source: Source
    steps: tuple[int, ...]
    """Of the engine, that each text has taken."""
    written: str
    """Checksum of the tokens that came of them."""

    def __str__(self) -> str:
        return f"{self.source}.{'-'.join(map(str, self.steps))}.{self.written}"

    @classmethod
    def parse(cls, text: str) -> Self | Refusal:
        """The id that a client sends back."""
        found = _EVENT_ID.fullmatch(text)
        if found is None:
            return _refusal(
                400, f"received {short(repr(text))}; allowed: the id of an event of this API", "invalid_value"
            )
        source = Source(found["call"], int(found["created"]), found["fingerprint"], found["asked"])
        return cls(source, tuple(map(int, found["steps"].split("-"))), found["written"])

    def again(self, asked: BaseModel, call: Call, model: ServedModel) -> Call | Refusal:
        """The call that has the answer written once more, or why the event is none of an answer to this request.

        The first call may still be in the engine under its own id.
        """
        if self.source.asked != digest_of(asked) or len(self.steps) != call.answers:
            return _refusal(400, f"it is of the answer to another request; {_ANEW}", "request_mismatch")
        digests = (version.digest for version in model.versions)
        digest = next((each for each in digests if fingerprint(each) == self.source.fingerprint), None)
        if digest is None:
            return _refusal(410, f"the model that wrote the answer is no longer served; {_ANEW}", "model_replaced")
        return replace(call, id=f"{call.id}.{secrets.token_hex(4)}", begun_by=digest)


class Cursor:
    """How far a stream has come; makes the ids of its events."""

    def __init__(self, source: Source, answers: int) -> None:
        self.source = source
        self._steps = [0] * answers
        self._sums = array("I", [0] * answers)

    def advance(self, pieces: Sequence[Piece]) -> None:
        """Takes down what is given out, as it came of the engine: a piece a step."""
        for piece in pieces:
            self._steps[piece.index] += 1
            self._sums[piece.index] = crc32(array("I", piece.token_ids), self._sums[piece.index])

    @property
    def event_id(self) -> EventId:
        """Of an event that says all that was taken down."""
        return EventId(self.source, tuple(self._steps), f"{crc32(self._sums):08x}")


def digest_of(asked: BaseModel) -> str:
    """Of a request; equal for all ways to write the same one."""
    kind = type(asked).__name__
    return blake2b(f"{kind} {asked.model_dump_json(exclude_defaults=True)}".encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Begun:
    """An answer whose first pieces are there."""

    cursor: Cursor
    """Stands before them."""
    had: Sequence[Piece] | None
    """Those that the client has of a stream that goes on; None for an answer that is new."""
    first: Sequence[Piece]
    """Those that are to be given out; may be none for a stream that goes on."""


async def begin(
    batches: AsyncIterator[Sequence[Piece] | Refusal], asked: BaseModel, call: Call, event_id: EventId | None
) -> Begun | Refusal:
    """Reads the first pieces of an answer, or, of one that is written again, those after an event."""
    if event_id is not None:
        return await _catch_up(batches, event_id, Cursor(event_id.source, call.answers))
    first = await anext(batches)
    if isinstance(first, Refusal):
        return first
    source = Source(call.id, int(time.time()), fingerprint(first[0].model_digest), digest_of(asked))
    return Begun(Cursor(source, call.answers), None, first)


async def _catch_up(
    batches: AsyncIterator[Sequence[Piece] | Refusal], event_id: EventId, cursor: Cursor
) -> Begun | Refusal:
    """Reads on until all that the client has was written again; a refusal if that are other tokens."""
    had: list[Piece] = []
    after: list[Piece] = []
    missing = list(event_id.steps)
    async for batch in batches:
        if isinstance(batch, Refusal):
            return batch
        for piece in batch:
            (had if missing[piece.index] else after).append(piece)
            missing[piece.index] = max(0, missing[piece.index] - 1)
        if not any(missing):
            break
    cursor.advance(had)
    if cursor.event_id != event_id:
        return _refusal(410, f"written again, the answer has other tokens than before; {_ANEW}", "not_repeatable")
    return Begun(cursor, had, after)


def _refusal(status: int, why: str, code: str) -> Refusal:
    return Refusal(status, f"{HEADER}: {why}", code, HEADER)
