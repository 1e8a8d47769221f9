"""What an engine is busy with, seen from the outside: a runner that counts what goes in and comes out of another.

A request that has waited too long for its first token is refused: what comes later than its client cares for would only
make others wait as long.

The engine's thread counts; `report` and `step_seconds` may be read by any other. Costs a few dictionary operations a
token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from actors.engine.encodings import EncodeEvent, EncodeRequest
from actors.engine.request import TokenEvent
from actors.engine.runner import Runner
from configs.errors import OverloadedError
from serving.calls import LoadReport

_REMEMBERED_SECONDS = 10.0
"""Busy time over which the speed of reading is averaged."""


@dataclass
class _Flight:
    request: Any
    tokens: int
    since: float
    """When it was submitted."""


class Watch:
    """A `Runner` in front of another one.

    Args of the constructor:
        runner: what does the work.
        capacity_tokens: tokens whose keys and values it can hold.
        queue_limit_seconds: how long a request may be without a token.
    """

    def __init__(self, runner: Runner[Any, Any], *, capacity_tokens: int, queue_limit_seconds: float) -> None:
        self._runner = runner
        self._queue_limit_seconds = queue_limit_seconds
        self._capacity_tokens = capacity_tokens
        self._waiting: dict[str, _Flight] = {}
        """Requests without a token, in order of arrival."""
        self._running: dict[str, _Flight] = {}
        self._waiting_tokens = 0
        self._running_tokens = 0
        self._step_began: float | None = None
        self._busy_seconds = 0.0
        self._read_tokens = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._runner.has_work

    @property
    def step_seconds(self) -> float:
        """How long the step has taken that runs now; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def report(self) -> LoadReport:
        """The work there is now."""
        return LoadReport(
            waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            running=len(self._running),
            running_tokens=self._running_tokens,
            capacity_tokens=self._capacity_tokens,
            prompt_tokens_per_second=self._read_tokens / self._busy_seconds if self._busy_seconds else 0.0,
        )

    def submit(self, request: Any) -> None:
        """Queues a request; raises as the runner does."""
        self._runner.submit(request)
        tokens = _tokens(request)
        self._waiting[request.id] = _Flight(request, tokens, time.monotonic())
        self._waiting_tokens += tokens

    def cancel(self, request_id: str) -> None:
        """Drops a request; one that has ended already is no error."""
        self._runner.cancel(request_id)
        self._end(request_id)

    def step(self) -> Sequence[Any]:
        """The runner's step, timed."""
        self._step_began = began = time.monotonic()
        try:
            events = self._runner.step()
        finally:
            self._step_began = None
        now = time.monotonic()
        read = sum(map(self._advance, events))
        self._measure(read, now - began)
        return [*events, *self._overdue(now)]

    def _overdue(self, now: float) -> Iterator[TokenEvent | EncodeEvent]:
        """Drops the requests that have waited too long; their last events."""
        while self._waiting:
            flight = next(iter(self._waiting.values()))
            if now - flight.since <= self._queue_limit_seconds:
                return
            self.cancel(flight.request.id)
            yield _refused(flight, now - flight.since)

    def _advance(self, event: Any) -> int:
        """Takes an event down; prompt tokens that were read for it."""
        read = 0
        started = self._waiting.pop(event.request_id, None)
        if started is not None:
            read = event.prompt_tokens
            self._running[event.request_id] = started
            self._waiting_tokens -= started.tokens
            self._running_tokens += started.tokens
        new = len(getattr(event, "token_ids", ()))
        self._running[event.request_id].tokens += new
        self._running_tokens += new
        if event.finish_reason is not None:
            self._end(event.request_id)
        return read

    def _end(self, request_id: str) -> None:
        if request_id in self._waiting:
            self._waiting_tokens -= self._waiting.pop(request_id).tokens
        elif request_id in self._running:
            self._running_tokens -= self._running.pop(request_id).tokens

    def _measure(self, read: int, seconds: float) -> None:
        kept = max(0.0, 1.0 - seconds / _REMEMBERED_SECONDS)
        self._busy_seconds = self._busy_seconds * kept + seconds
        self._read_tokens = self._read_tokens * kept + read


def _tokens(request: Any) -> int:
    """To be read for a request. An encoder's requests are texts: a token is about four characters."""
    if isinstance(request, EncodeRequest):
        return len(request.text) // 4 + 1
    return len(request.prompt_ids) + len(request.generated)


def _refused(flight: _Flight, waited: float) -> TokenEvent | EncodeEvent:
    """The last event of a request that nothing came of."""
    error = OverloadedError(
        "the request waited too long for its turn",
        received=f"{waited:.0f} s",
        next_step="try again later, or raise serving.queue_limit_seconds or the number of replicas",
    )
    request = flight.request
    if isinstance(request, EncodeRequest):
        return EncodeEvent(request.id, None, 0, False, "error", error)
    return TokenEvent(request.id, (), "", len(request.prompt_ids), 0, "error", error)
