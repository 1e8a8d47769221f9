"""A runner behind asyncio: steps run in a thread of their own, events arrive at the coroutines that asked.

The thread alone touches the runner; coroutines send it commands, so that no event loop ever waits for a step. If a
step fails, the runner's state is unknown: every open stream gets the error, and so does every later one.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.engine.runner import Asked, Event, Runner
from configs.errors import EngineError, GanymedeError

_Request = TypeVar("_Request", bound=Asked)
_Event = TypeVar("_Event", bound=Event)


@dataclass(frozen=True, eq=False)
class _Stream(Generic[_Request, _Event]):
    """The end of one request in an event loop."""

    request: _Request
    loop: asyncio.AbstractEventLoop
    deliver: Callable[[_Event | GanymedeError], None]


_Item = tuple[_Stream[_Request, _Event], _Event | GanymedeError]


class AsyncEngine(Generic[_Request, _Event]):
    """Runs a runner in a thread for any number of coroutines and event loops. `close` ends the thread."""

    def __init__(self, runner: Runner[_Request, _Event]) -> None:
        self.error: GanymedeError | None = None
        """Why the engine can serve no more; None while it can."""
        self._runner = runner
        self._streams: dict[str, _Stream[_Request, _Event]] = {}
        """Open streams by request id; the thread's own."""
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ending = threading.Lock()
        """Held to send a command and to set `error`: no command is sent to a thread that takes no more."""
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are served."""
        return self.error is None

    async def stream(self, request: _Request) -> AsyncIterator[_Event]:
        """Events of a request until it ends; closing the iterator early cancels the request.

        Raises what the runner's `submit` raises, and `EngineError` if the engine fails or is closed meanwhile. An event
        with `finish_reason` `error` is given out, not raised.
        """
        items: asyncio.Queue[_Event | GanymedeError] = asyncio.Queue()
        cancel = self.begin(request, items.put_nowait)
        try:
            ended = False
            while not ended:
                item = await items.get()
                if isinstance(item, GanymedeError):
                    raise item
                ended = item.finish_reason is not None
                yield item
        finally:
            cancel()

    def begin(self, request: _Request, deliver: Callable[[_Event | GanymedeError], None]) -> Callable[[], None]:
        """Runs a request, whose events are handed to `deliver` on the running event loop: the one with a
        `finish_reason` is the last, and so is an error that `stream` would raise.

        Returns what cancels the request; once that has ended it does nothing. Raises `EngineError` if the engine serves
        no more.
        """
        stream: _Stream[_Request, _Event] = _Stream(request, asyncio.get_running_loop(), deliver)
        with self._ending:
            if self.error is not None:
                raise self.error
            self._commands.put(lambda: self._open(stream))
        # A thread that has ended leaves this unread, which is right: it has no requests any more.
        return lambda: self._commands.put(lambda: self._drop(stream))

    def close(self) -> None:
        """Ends the thread after the step it is in; open streams get an `EngineError`."""
        self._commands.put(None)
        self._thread.join()

    def _serve(self) -> None:
        try:
            while self._obey_commands():
                events = self._runner.step()
                self._send((self._streams[event.request_id], event) for event in events)
            failure: GanymedeError = EngineError("the engine was closed")
        except Exception as error:  # noqa: BLE001 - whatever it is, every stream is told
            failure = EngineError(f"the engine failed: {type(error).__name__}: {error}", next_step="restart it")
            failure.__cause__ = error
        with self._ending:
            self.error = failure
        self._send((stream, failure) for stream in list(self._streams.values()))
        # No stream is open any more: what was sent meanwhile can only be a request, which is refused.
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()

    def _obey_commands(self) -> bool:
        """Runs the commands that are there, waiting for one while there is nothing else to do; False once closed."""
        while True:
            try:
                command = self._commands.get(block=not self._runner.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _open(self, stream: _Stream[_Request, _Event]) -> None:
        if self.error is not None:
            self._send([(stream, self.error)])
            return
        try:
            self._runner.submit(stream.request)
        except GanymedeError as error:
            self._send([(stream, error)])
        else:
            self._streams[stream.request.id] = stream

    def _drop(self, stream: _Stream[_Request, _Event]) -> None:
        if self._streams.get(stream.request.id) is stream:
            del self._streams[stream.request.id]
            self._runner.cancel(stream.request.id)

    def _send(self, items: Iterable[_Item[_Request, _Event]]) -> None:
        """Hands items over, waking each event loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Item[_Request, _Event]]] = defaultdict(list)
        for stream, item in items:
            by_loop[stream.loop].append((stream, item))
            is_last = isinstance(item, GanymedeError) or item.finish_reason is not None
            if is_last and self._streams.get(stream.request.id) is stream:
                del self._streams[stream.request.id]
        for loop, group in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, group)
            except RuntimeError:
                # The loop was closed with streams open: nobody waits for these any more.
                for stream, _ in group:
                    self._drop(stream)


def _put(group: list[_Item[_Request, _Event]]) -> None:
    for stream, item in group:
        stream.deliver(item)
