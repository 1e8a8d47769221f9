"""Which rank the others wait for: each says, before it joins a sum over all ranks, that it has come so far.

One file a rank, of one line that is written over, on the storage that all ranks share. A rank whose sum times out reads
who has not arrived.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

_FOLDER = "ranks"
_WIDTH = 160
"""Bytes of the line, so that a later one covers an earlier."""


class Presence:
    """The marks of `rank` among `world_size` below `work`."""

    def __init__(self, work: Path, rank: int, world_size: int) -> None:
        self._folder = work / _FOLDER
        self._rank = rank
        self._world_size = world_size
        self._who = f"process {os.getpid()} on {socket.gethostname()}"
        self._file: int | None = None

    def arrive(self, step: int) -> None:
        """Marks that this rank is about to join the sum of `step`."""
        if self._world_size == 1:
            return
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._folder / str(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(self._file, f"{step} {self._who}".ljust(_WIDTH).encode(), 0)

    def missing(self) -> str:
        """The ranks that are behind the one that came furthest, for people."""
        marks: dict[int, tuple[int, str]] = {}
        for rank in range(self._world_size):
            path = self._folder / str(rank)
            step, _, who = path.read_text().strip().partition(" ") if path.exists() else ("0", "", "never seen")
            marks[rank] = int(step), who
        furthest = max(step for step, _ in marks.values())
        behind = [f"rank {rank} ({who})" for rank, (step, who) in marks.items() if step < furthest]
        return f"{', '.join(behind) or 'no rank by its marks'} did not come to the sum of step {furthest}"

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def is_timeout(error: BaseException) -> bool:
    """Whether a sum over ranks was given up because some did not come."""
    return isinstance(error, RuntimeError) and "timed out" in str(error).lower()
