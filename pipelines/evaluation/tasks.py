"""The held-out tasks: which metric judges which, and which pairs are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import CorruptArtifactError, DataError
from configs.schema.evaluation import Metric
from pipelines.corpus.instructions import Pair, Task

METRIC_OF: Mapping[Task, Metric] = {"summary": "rouge_l", "signature": "chrf"}


@dataclass(frozen=True)
class Selection:
    """The pairs that every model is asked."""

    pairs: tuple[Pair, ...]
    """By task, then in the order of a hash of their id."""
    too_long: Mapping[Task, int]
    """Pairs passed over because a prompt and its answer would not fit the context of every model."""

    def of(self, task: Task) -> list[Pair]:
        """The pairs of one task."""
        return [pair for pair in self.pairs if pair.task == task]

    @property
    def tasks(self) -> list[Task]:
        """The tasks there are pairs of."""
        return [task for task in METRIC_OF if any(pair.task == task for pair in self.pairs)]


def load_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSON lines file. Raises `CorruptArtifactError` for a line that is none."""
    pairs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                pairs.append(Pair.model_validate_json(line))
            except ValueError as error:
                raise CorruptArtifactError(f"{path}, line {number} is no instruction pair: {error}") from error
    return pairs


def select(pairs: list[Pair], count: int, fits: Callable[[Pair], bool]) -> Selection:
    """Up to `count` pairs of each task that fit, drawn evenly from all sources by the order of a hash.

    Raises:
        DataError: a task has pairs, but none that fits, or there is no pair at all.
    """
    chosen: list[Pair] = []
    too_long: dict[Task, int] = {}
    for task in METRIC_OF:
        ranked = sorted((p for p in pairs if p.task == task), key=lambda p: hashlib.sha256(p.id.encode()).digest())
        taken: list[Pair] = []
        too_long[task] = 0
        for pair in ranked:
            if len(taken) == count:
                break
            if fits(pair):
                taken.append(pair)
            else:
                too_long[task] += 1
        if ranked and not taken:
            raise DataError(
                f"no held-out pair of task {task} fits the models' context with an answer",
                next_step="lower evaluate.max_new_tokens or instructions.max_prompt_chars",
            )
        chosen += taken
    if not chosen:
        raise DataError("the dataset holds no held-out pair", next_step="check the instructions stage's report")
    return Selection(tuple(chosen), too_long)
