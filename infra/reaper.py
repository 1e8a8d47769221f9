"""Ends what an embedded Ray leaves behind when its driver is killed.

The kernel ends Ray's servers with the driver, but Ray's two node agents are grandchildren: they notice by themselves
and then try for a minute to report it to a control store that is gone (measured: both alive 30 s after `kill -9`); so
does a worker that was just starting. All that Ray starts inherits a mark in its environment. The watcher is a process
that sleeps until the driver's end of a pipe closes, however that happens, and ends what still bears the mark.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import psutil

GRACE_SECONDS = 1.0
MARK = "GANYMEDE_FAMILY"
"""Environment variable that a driver's whole family has in common."""


def mark_children() -> None:
    """Marks this process's children to come; call before Ray is started."""
    os.environ[MARK] = uuid.uuid4().hex


def watch_children() -> subprocess.Popen[str]:
    """Starts the watcher over everything that bears the mark; closing its `stdin` lets it finish and end."""
    kept = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import main; main({os.environ[MARK]!r}, {os.getpid()})"],
        env=kept,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )


def main(mark: str, driver: int) -> None:
    """Waits for the end of standard input, then ends what bears the mark and still lives, except the driver."""
    sys.stdin.read()
    living = [process for process in _marked(mark) if process.pid != driver]
    _, late = psutil.wait_procs(living, timeout=GRACE_SECONDS)
    # A server of Ray that lived a moment longer may have started one more worker.
    for process in {*late, *(process for process in _marked(mark) if process.pid != driver)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                yield process
