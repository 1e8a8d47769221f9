"""Progress of a run on standard error: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from infra.cli.output import duration, figure

if TYPE_CHECKING:
    from pipelines.runner import Outcome
    from pipelines.stage import Progress

PLAIN_EVERY_SECONDS = 10.0


_SHOWN = {
    "loss": "loss",
    "tokens_per_second": "tokens/s",
    "tokens/s": "tokens/s",
    "MB/s": "MB/s",
    "megabytes_per_second": "MB/s",
    "pairs": "pairs",
    "score": "score",
}
"""Figures with room in a line, and what they are called there; all of them go to the tracker."""


def _phrase(name: str, value: float) -> str:
    return f"{_SHOWN[name]} {figure(value)}"


class RunProgress:
    """Watches a run for a person; an `Observer` of the runner. Safe to call from any thread."""

    def __init__(self, console: Console, *, plain_every_seconds: float = PLAIN_EVERY_SECONDS) -> None:
        self._console = console
        self._every = plain_every_seconds
        self._live = console.is_terminal
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[position]}", markup=False),
            TextColumn("{task.fields[figures]}", markup=False, style="cyan"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._lock = threading.Lock()
        self._task: TaskID | None = None
        self._first: Progress | None = None
        self._moving = False
        self._began = self._last_line = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        """One line above the bar."""
        self._console.print(Text(line))

    def stage_started(self, name: str, kind: str) -> None:
        """A bar, or a line, for the stage."""
        with self._lock:
            self._last_line = time.monotonic()
            self._first = None
            if self._live:
                self._task = self._bars.add_task(name, total=None, position="", figures="")
            else:
                self._console.print(Text(f"{name}: started"))

    def stage_progress(self, name: str, progress: Progress) -> None:
        """Moves the bar; off a terminal, a line if the last one is old enough. A note is always printed."""
        position = f"{figure(progress.done)}/{figure(progress.total)} {progress.unit}"
        figures = "  ".join(_phrase(name, value) for name, value in progress.figures.items() if name in _SHOWN)
        with self._lock:
            if progress.note:
                self._console.print(Text(f"{name}: {progress.note}"))
            if self._task is not None:
                self._bars.update(
                    self._task, completed=progress.done, total=progress.total, position=position, figures=figures
                )
                return
            now = time.monotonic()
            if self._first is None or progress.unit != self._first.unit:
                self._first, self._began, self._moving = progress, now, False
            elif not self._moving and progress.done > self._first.done:
                self._first, self._began, self._moving = progress, now, True
            if self._live or now - self._last_line < self._every:
                return
            self._last_line = now
            self._console.print(Text(f"{name}: {position}  {figures}{self._left(progress, now)}"))

    def _left(self, progress: Progress, now: float) -> str:
        """Time left by the pace since the first report that moved; what an earlier run did, and starting up before it,
        is not pace."""
        gained = progress.done - (self._first or progress).done
        if gained <= 0:
            return ""
        return f"  left {duration((now - self._began) * (progress.total - progress.done) / gained)}"

    def stage_finished(self, name: str, outcome: Outcome) -> None:
        """One lasting line for the stage."""
        with self._lock:
            if self._task is not None:
                self._bars.remove_task(self._task)
                self._task = None
            made = f"{outcome.status} {outcome.ref}" if outcome.ref else outcome.status
            self._console.print(Text(f"{name}: {made} in {duration(outcome.seconds)}"))
