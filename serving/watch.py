"""What an engine is busy with, seen from the outside: a runner that counts what goes in and comes out of another.

The engine's thread counts; `report` and `step_seconds` may be read by any other. Costs a few dictionary operations a
token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.engine.encodings import EncodeRequest
from actors.engine.runner import Runner
from serving.calls import LoadReport

_REMEMBERED_SECONDS = 10.0
"""Busy time over which the speed of reading is averaged."""


@dataclass
class _Flight:
    tokens: int
    started: bool = False


class Watch:
    """A `Runner` in front of another one.

    Args of the constructor:
        runner: what does the work.
        capacity_tokens: tokens whose keys and values it can hold.
    """

    def __init__(self, runner: Runner[Any, Any], *, capacity_tokens: int) -> None:
        self._runner = runner
        self._capacity_tokens = capacity_tokens
        self._flights: dict[str, _Flight] = {}
        self._running = 0
        self._running_tokens = 0
        self._waiting_tokens = 0
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
        running = self._running
        return LoadReport(
            waiting=max(0, len(self._flights) - running),
            waiting_tokens=self._waiting_tokens,
            running=running,
            running_tokens=self._running_tokens,
            capacity_tokens=self._capacity_tokens,
            prompt_tokens_per_second=self._read_tokens / self._busy_seconds if self._busy_seconds else 0.0,
        )

    def submit(self, request: Any) -> None:
        """Queues a request; raises as the runner does."""
        self._runner.submit(request)
        tokens = _tokens(request)
        self._flights[request.id] = _Flight(tokens)
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
        read = sum(map(self._advance, events))
        self._measure(read, time.monotonic() - began)
        return events

    def _advance(self, event: Any) -> int:
        """Takes an event down; prompt tokens that were read for it."""
        flight = self._flights[event.request_id]
        read = 0
        if not flight.started:
            flight.started, read = True, event.prompt_tokens
            self._waiting_tokens -= flight.tokens
            self._running += 1
            self._running_tokens += flight.tokens
        new = len(getattr(event, "token_ids", ()))
        flight.tokens += new
        self._running_tokens += new
        if event.finish_reason is not None:
            self._end(event.request_id)
        return read

    def _end(self, request_id: str) -> None:
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return
        if flight.started:
            self._running -= 1
            self._running_tokens -= flight.tokens
        else:
            self._waiting_tokens -= flight.tokens

    def _measure(self, read: int, seconds: float) -> None:
        kept = max(0.0, 1.0 - seconds / _REMEMBERED_SECONDS)
        self._busy_seconds = self._busy_seconds * kept + seconds
        self._read_tokens = self._read_tokens * kept + read


def _tokens(request: Any) -> int:
    """To be read for a request. An encoder's requests are texts: a token is about four characters."""
    if isinstance(request, EncodeRequest):
        return len(request.text) // 4 + 1
    return len(request.prompt_ids) + len(request.generated)
