"""Ends what an embedded Ray leaves behind when its driver is killed.

The kernel ends Ray's servers with the driver, and workers end when they lose their server. Two kinds stay: Ray's node
agents, which try for a minute to report it to a control store that is gone (measured: both alive 30 s after `kill -9`),
and workers that were just starting. The agents are there from the beginning; a starting worker is known by a mark in
its environment, which it loses when Ray gives it a title. The watcher is a process that sleeps until the driver's end
of a pipe closes, however that happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid

import psutil

GRACE_SECONDS = 1.0
MARK = "GANYMEDE_FAMILY"
"""Environment variable that a driver's whole family has in common."""


def mark_children() -> None:
    """Marks this process's children to come; call before Ray is started."""
    os.environ[MARK] = uuid.uuid4().hex


def watch_children() -> subprocess.Popen[str]:
    """Starts the watcher over everything below this process; closing its `stdin` lets it finish and end."""
    family = [(p.pid, p.create_time()) for p in psutil.Process().children(recursive=True)]
    watcher = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import main; main({os.environ[MARK]!r})"],
        env={name: value for name, value in os.environ.items() if name != MARK},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    if watcher.stdin is not None:
        watcher.stdin.write(json.dumps({"driver": os.getpid(), "family": family}) + "\n")
        watcher.stdin.flush()
    return watcher


def main(mark: str) -> None:
    """Waits for the end of standard input, then ends what still lives of the driver's family; not the driver."""
    told = json.loads(sys.stdin.readline())
    sys.stdin.read()
    living = {p for pid, started in told["family"] if (p := _find(int(pid), float(started))) is not None}
    _, late = psutil.wait_procs(living | _marked(mark, told["driver"]), timeout=GRACE_SECONDS)
    # A server that lived a moment longer may have started one more worker.
    for process in {*late, *_marked(mark, told["driver"])}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _find(pid: int, started: float) -> psutil.Process | None:
    """The process, unless it has ended; a reused id is not taken for it."""
    try:
        process = psutil.Process(pid)
        return process if process.create_time() == started else None
    except psutil.NoSuchProcess:
        return None


def _marked(mark: str, driver: int) -> set[psutil.Process]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != driver and process.environ().get(MARK) == mark:
                found.add(process)
    return found
