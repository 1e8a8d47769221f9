"""The figures of a run as JSON lines: rank 0 of the workers writes them, the driver follows along.

Tracking servers are thus talked to by the driver alone and cannot slow training down. A resumed run cuts the file back
to the checkpoint it goes on from, so that the file always tells one history.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from actors.store.artifacts import write_durably

FILE = "metrics.jsonl"

STEP_FIGURES = (
    "step", "time_ms", "tokens_seen", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "data_wait_fraction",
    "checkpoint_stall_seconds",
)  # fmt: skip
"""What every line of a step holds; further figures come from an evaluation."""


class MetricsFile:
    """The writing end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def resumed(self, step: int) -> None:
        """Cuts the file back to lines of steps up to `step`."""
        kept = [json.dumps(line) + "\n" for line in read_metrics(self._path) if line.get("step", 0) <= step]
        self.close()
        write_durably(self._path, "".join(kept).encode())

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line, readable at once."""
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the file; the last one may have been cut short by a kill. Empty where there is no file."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


class Follower:
    """The reading end: gives each step once, however often the file is cut back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._position = 0
        self._last_step = 0
        self._notices: set[str] = set()

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Lines that came since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            inode = self._path.stat().st_ino
            if inode != self._inode:
                self._inode, self._position = inode, 0
            file.seek(self._position)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        for line in map(json.loads, whole.splitlines()):
            if self._is_new(line):
                yield line

    def _is_new(self, line: Mapping[str, Any]) -> bool:
        if "notice" in line:
            new = line["notice"] not in self._notices
            self._notices.add(line["notice"])
            return new
        new = line["step"] > self._last_step
        self._last_step = max(self._last_step, line["step"])
        return new
