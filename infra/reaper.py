"""Ends what an embedded Ray leaves behind when its driver is killed.

The kernel ends Ray's servers with the driver, but Ray's two node agents are grandchildren: they notice by themselves
and then try for a minute to report it to a control store that is gone (measured: both alive 30 s after `kill -9`). The
watcher is a process that sleeps until the driver's end of a pipe closes, however that happens.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import psutil

GRACE_SECONDS = 1.0


def watch_children() -> subprocess.Popen[str]:
    """Starts the watcher over everything below this process; closing its `stdin` lets it finish and end."""
    family = [(p.pid, p.create_time()) for p in psutil.Process().children(recursive=True)]
    watcher = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    if watcher.stdin is not None:
        watcher.stdin.write(json.dumps(family) + "\n")
        watcher.stdin.flush()
    return watcher


def main() -> None:
    """Waits for the end of standard input, then ends those of the processes on its first line that still live."""
    family = [(int(pid), float(started)) for pid, started in json.loads(sys.stdin.readline())]
    sys.stdin.read()
    living = [p for pid, started in family if (p := _find(pid, started)) is not None]
    _, late = psutil.wait_procs(living, timeout=GRACE_SECONDS)
    for process in late:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _find(pid: int, started: float) -> psutil.Process | None:
    """The process, unless it has ended; a reused id is not taken for it."""
    try:
        process = psutil.Process(pid)
        return process if process.create_time() == started else None
    except psutil.NoSuchProcess:
        return None
