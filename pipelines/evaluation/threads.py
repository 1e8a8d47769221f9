"""Calls that wait for something else, some at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def at_once(calls: Sequence[Callable[[], T]], threads: int) -> Iterator[tuple[int, T]]:
    """The results of `calls` as they come, each with its place; what a call raises is raised, and no other is begun.

    At most twice as many as there are threads are under way or done and not taken yet. Whoever ends the process does
    not wait for calls that are under way.
    """
    waiting = iter(enumerate(calls))
    lock = threading.Lock()
    room = threading.Semaphore(2 * threads)
    ended = threading.Event()
    results: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        while room.acquire() and not ended.is_set():
            with lock:
                number, call = next(waiting, (-1, None))
            if call is None:
                return
            try:
                results.put((number, call(), None))
            except BaseException as error:  # noqa: BLE001 - raised where the results are taken
                ended.set()
                results.put((number, None, error))

    for _ in range(min(threads, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in calls:
            number, made, error = results.get()
            room.release()
            if error is not None:
                raise error
            yield number, made
    finally:
        ended.set()
        room.release(threads)
