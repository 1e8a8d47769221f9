import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError, StageError
from pipelines.corpus.tasks import run_bounded

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def _results_of(function: Callable[[Any], Any], argument: Any) -> list[Any]:
    with run_bounded(function, [argument]) as results:
        return list(results)


def test_every_argument_gives_its_result() -> None:
    with run_bounded(lambda n: n * n, range(20), in_flight=3) as results:
        assert sorted(results) == [n * n for n in range(20)]


def test_arguments_are_taken_only_as_tasks_finish() -> None:
    taken: list[int] = []

    def arguments():
        for n in range(10):
            taken.append(n)
            yield n

    with run_bounded(lambda n: n, arguments(), in_flight=2) as results:
        assert taken == [0, 1]  # on their way before a result is asked for
        next(results)
        assert len(taken) <= 3
    assert len(taken) <= 3


def test_an_error_of_ours_comes_back_as_it_was_raised() -> None:
    def fail(n: int) -> None:
        raise DataError("file is bad", received=n, allowed="good files", next_step="mend it")

    with pytest.raises(DataError, match="file is bad; received 7; allowed: good files; next: mend it"):
        _results_of(fail, 7)


def test_any_other_error_is_a_stage_error_that_says_it() -> None:
    with pytest.raises(StageError, match="modulo by zero"):
        _results_of(lambda n: 1 // n, 0)


def test_a_task_whose_worker_is_killed_is_run_again(tmp_path: Path) -> None:
    def die_once(path: Path) -> str:
        if not path.exists():
            path.write_text("was here")
            os.kill(os.getpid(), 9)
        return path.read_text()

    assert _results_of(die_once, tmp_path / "mark") == ["was here"]
