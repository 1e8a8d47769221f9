"""Programs that nobody has read, run where they can do no harm.

A program runs in a Python process of its own, which before its first line gives up by seccomp, for good: sockets; new
processes (threads stay possible); opening a file for writing, and deleting, renaming or changing one; signals to other
processes, tracing, mounting and the like. A refused call fails with `PermissionError`. Limits hold on processor and
wall-clock time, memory, open files and output. Where the system allows, the process is also in namespaces of its own
(user, network, IPC), where there is no network to reach. It can read what its user can read. Linux on x86-64 or
aarch64 only: anywhere else nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from configs.errors import GanymedeError

Status = Literal["passed", "failed", "timeout", "output", "killed"]

OUTPUT_BYTES = 64 << 10
"""Output after which a program is ended."""
_START_SECONDS = 60.0
"""For an interpreter to start on a busy machine; a program's own time begins then."""
_WAITING = 4
"""Wall-clock time that a program may take is so many times its processor time: how busy the machine is decides nothing
but for programs that wait."""
_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")


class SandboxError(GanymedeError):
    """Programs cannot be run safely here."""

    code = "no_sandbox"


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: Status
    """`passed`: it came to its end; `failed`: it raised or exited; `timeout`; `output`: it wrote too much; `killed`: it
    died of a signal."""
    output: str
    """The last of what it wrote, errors included."""
    seconds: float
    isolated: bool
    """Whether it had namespaces of its own beside the rest."""


def run_program(source: str, *, seconds: float, memory_bytes: int) -> Outcome:
    """Runs Python source to its end, or for `seconds` of processor time (whole ones, rounded up).

    Raises:
        SandboxError: this system cannot hold a program back; nothing was run.
    """
    _check_system()
    done = secrets.token_hex(16)
    settings = {"source": source, "done": done, "seconds": seconds, "memory_bytes": memory_bytes}
    with tempfile.TemporaryDirectory(prefix="ganymede-sandbox-") as folder:
        control, report = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", str(_LAUNCHER), str(report)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, pass_fds=[report],
                env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(report)
        try:
            return _watch(process, control, json.dumps(settings).encode(), done, seconds)
        finally:
            _end(process)
            os.close(control)


@cache
def _check_system() -> None:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64") or sys.byteorder != "little":
        raise SandboxError(
            "programs cannot be run safely on this system", received=f"{sys.platform} {machine}",
            allowed="Linux on x86-64 or aarch64, which can hold a process back (seccomp)",
            next_step="run tasks of kind code in a Linux container",
        )  # fmt: skip


def _watch(process: subprocess.Popen[bytes], control: int, settings: bytes, done: str, seconds: float) -> Outcome:
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise SandboxError("the program's process has no pipes")
    with contextlib.suppress(BrokenPipeError), stdin:  # if it died at once, what it reported tells why
        stdin.write(settings)
    written = bytearray()
    reported = bytearray()
    deadline = time.monotonic() + _START_SECONDS
    began = time.monotonic()
    status: Status | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ, written)
        selector.register(control, selectors.EVENT_READ, reported)
        while selector.get_map() and status is None:
            left = deadline - time.monotonic()
            if left <= 0:
                status = "timeout"
                break
            for key, _ in selector.select(left):
                content = os.read(key.fd, 1 << 16)
                if not content:
                    selector.unregister(key.fileobj)
                    continue
                if key.data is reported and not reported:
                    began = time.monotonic()
                    deadline = began + _WAITING * seconds
                key.data.extend(content)
            if len(written) > OUTPUT_BYTES:
                status = "output"
    _end(process)
    lines = reported.decode(errors="replace").split("\n")
    if lines[0] not in ("isolated", "held"):
        if status == "timeout":
            raise SandboxError("a process to run programs in did not start", received=f"{_START_SECONDS} s")
        raise SandboxError(
            "this system does not let a process give up its rights, so that no program is run",
            received=(reported + written[-2000:]).decode(errors="replace").strip(),
            allowed="a Linux with seccomp filters",
            next_step="run tasks of kind code in another container or on another machine",
        )
    if status is None:
        passed = lines[1:2] == [done] and process.returncode == 0
        if process.returncode == -signal.SIGXCPU:
            status = "timeout"
        else:
            status = "passed" if passed else "killed" if (process.returncode or 0) < 0 else "failed"
    text = written[-4000:].decode(errors="replace")
    return Outcome(status, text, time.monotonic() - began, lines[0] == "isolated")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and whatever is in its session. One that closed its pipes is given a moment to end by itself."""
    try:
        process.wait(0.2 if process.poll() is None else None)
    except subprocess.TimeoutExpired:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
