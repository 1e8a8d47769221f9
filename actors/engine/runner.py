"""The contract of everything that runs a model for many requests at once: decoders, encoder-decoders, encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from configs.errors import EngineError, GanymedeError, RequestError


class Asked(Protocol):
    """A request."""

    @property
    def id(self) -> str:
        """The caller's name for it, unique among the requests in flight."""
        ...


class Event(Protocol):
    """What one step has to say about one request."""

    @property
    def request_id(self) -> str:
        """Which one."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Why it has ended; None while it has not."""
        ...

    @property
    def error(self) -> GanymedeError | None:
        """Set if and only if `finish_reason` is `error`."""
        ...


RequestT = TypeVar("RequestT", bound=Asked, contravariant=True)
EventT = TypeVar("EventT", bound=Event, covariant=True)


class Runner(Protocol[RequestT, EventT]):
    """Every submitted request that is not cancelled ends exactly once. Not thread-safe."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        ...

    def submit(self, request: RequestT) -> None:
        """Queues a request. Raises `RequestError` if it cannot be served, `OverloadedError` if the queue is full."""
        ...

    def cancel(self, request_id: str) -> None:
        """Drops a request at once, without a further event; one that has ended already is no error."""
        ...

    def step(self) -> Sequence[EventT]:
        """Runs what is scheduled, and returns what there is to show for it."""
        ...


def run_to_end(
    runner: Runner[RequestT, EventT], requests: Sequence[RequestT], add: Callable[[RequestT], None]
) -> list[list[EventT]]:
    """Every event of each of `requests`, however many they are, in their order; `add` queues one without a bound.

    Raises what `add` raises, before anything runs, and `EngineError` if other requests are in flight (their events
    would be lost).
    """
    if runner.has_work:
        raise EngineError(
            "requests cannot be run to their end while others are in flight",
            next_step="submit them and call step, or wait until the others have ended",
        )
    events: dict[str, list[EventT]] = {request.id: [] for request in requests}
    try:
        for request in requests:
            add(request)
        while runner.has_work:
            for event in runner.step():
                events[event.request_id].append(event)
    finally:
        for request in requests:
            runner.cancel(request.id)
    return [events[request.id] for request in requests]


def check_kind(request: Any, kind: type, does: str) -> None:
    """Raises `RequestError` if a request is of another runner's kind; `does` says what this one does."""
    if not isinstance(request, kind):
        raise RequestError(
            f"this model {does}",
            param="model",
            received=type(request).__name__,
            allowed=kind.__name__,
            next_step="ask a model of the kind that the request is for",
        )
