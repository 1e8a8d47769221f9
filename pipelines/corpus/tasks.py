"""Ray tasks, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

import ray

from configs.errors import GanymedeError, StageError

A = TypeVar("A")
R = TypeVar("R")

MAX_RETRIES = 5
"""Times that a task is run again because its worker died."""


@contextmanager
def run_bounded(
    function: Callable[[A], R], arguments: Iterable[A], *, in_flight: int | None = None
) -> Iterator[Iterator[R]]:
    """Runs `function` on each argument as Ray tasks of one CPU; gives the results as they come.

    Ray must be initialised. The first tasks are on their way once the context is entered, so that the caller can do
    something else before it asks for results. At most `in_flight` tasks (two a CPU unless set) are submitted and
    unfinished at any time, so neither arguments nor results pile up. Once the context is left, tasks that have not
    begun never do.

    The results raise:
        GanymedeError: what `function` raised.
        StageError: a task failed otherwise, or its worker died more than `MAX_RETRIES` times.
    """
    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(function)
    limit = in_flight or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    next_step = "run the same command again: finished spans are kept; if memory is short, lower max_in_flight"
    waiting = iter(arguments)
    running: list[Any] = [remote.remote(argument) for argument in islice(waiting, limit)]

    def results() -> Iterator[R]:
        nonlocal running
        while running:
            done, running = ray.wait(running, num_returns=1)
            running.extend(remote.remote(argument) for argument in islice(waiting, 1))
            yield result_of(done[0], StageError, next_step)

    try:
        yield results()
    finally:
        with suppress(ray.exceptions.RayError):  # a lost cluster has cancelled them, and its own error is on the way
            for reference in running:
                ray.cancel(reference)


def result_of(reference: Any, kind: type[GanymedeError], next_step: str) -> Any:
    """What a task or an actor's method gave.

    Raises:
        GanymedeError: what it raised; or, if its worker or the cluster is gone, one of `kind` with `next_step`.
        StageError: it failed otherwise.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, GanymedeError):
            raise error.cause from None
        raise StageError(f"a Ray task failed: {error.cause}", next_step="run with --debug for the traceback") from error
    except ray.exceptions.RayError as error:
        said = str(error).strip().partition("\n")[0]
        raise kind(f"Ray lost a task and cannot run it again: {said}", next_step=next_step) from error
