"""A model several times, each copy in a Ray actor: groups of items go to whichever is free.

An answer depends on its group alone, so that scores are the same with any number of copies. A copy that dies is started
again, and asked again what it was asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import ray

from configs.errors import EngineError
from configs.schema.tasks import Task
from pipelines.corpus.tasks import result_of
from pipelines.evaluation.asking import Groups, Row, ask_group
from pipelines.evaluation.items import Item
from pipelines.evaluation.local_models import LocalModel

_AHEAD = 2
"""Groups that a copy has been given at any time: the next one is there when it is through with one."""
_RESTARTS = 3


class _Copy:
    """One copy; an actor. It loads when it is first asked: of an actor that cannot be made Ray keeps no cause."""

    def __init__(self, folder: Path, max_sequences: int, chat: bool) -> None:
        self._load = partial(LocalModel.load, folder, max_sequences=max_sequences, chat=chat)

    @cached_property
    def _model(self) -> LocalModel:
        return self._load()

    def facts(self) -> dict[str, Any]:
        return self._model.facts()

    def ask(self, task: Task, items: Sequence[Item], examples: Sequence[Item]) -> list[Row]:
        return ask_group(task, items, examples, self._model)


class Pool:
    """Copies of the model of a folder. Ray must be initialised; the copies end with the context.

    Args of the constructor:
        replicas: how many copies; each takes a CPU, and a GPU where the cluster has any.
        max_sequences, chat: as for `LocalModel.load`.
    """

    def __init__(self, folder: Path, *, replicas: int, max_sequences: int, chat: bool) -> None:
        options = {"num_cpus": 1, "max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
        if ray.cluster_resources().get("GPU"):
            options["num_gpus"] = 1
        actor = ray.remote(**options)(_Copy)
        self._copies = [actor.remote(folder, max_sequences, chat) for _ in range(replicas)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for copy in self._copies:
            with suppress(ray.exceptions.RayError):  # a lost cluster has none of them
                ray.kill(copy)

    def facts(self) -> dict[str, Any]:
        """As `LocalModel.facts`. Raises what `LocalModel.load` raises, and `EngineError` if the copy is lost."""
        return dict(self._result(self._copies[0].facts.remote()))

    def ask_groups(self, task: Task, groups: Groups, examples: Sequence[Item]) -> Iterator[tuple[int, list[Row]]]:
        """See `AskGroups`. Raises as `ask` does, and `EngineError` if a copy is lost too often."""
        waiting = iter(groups)
        running: dict[Any, tuple[int, Any]] = {}

        def give(copy: Any) -> None:
            following = next(waiting, None)
            if following is not None:
                number, group = following
                running[copy.ask.remote(task, group, examples)] = number, copy

        for copy in self._copies * _AHEAD:
            give(copy)
        while running:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            number, copy = running.pop(reference)
            made = self._result(reference)
            give(copy)
            yield number, made

    def _result(self, reference: Any) -> Any:
        return result_of(
            reference,
            EngineError,
            "run the same command again: answers are kept; if memory is short, take fewer replicas",
        )
