"""Hostile programs come to nothing; harmless ones run."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from actors.sandbox import OUTPUT_BYTES, Outcome, run_program

MEMORY = 256 << 20


def run(source: str, seconds: float = 3.0) -> Outcome:
    return run_program(source, seconds=seconds, memory_bytes=MEMORY)


def test_a_harmless_program_passes_with_modules_threads_and_output() -> None:
    outcome = run(
        "import collections, heapq, math, random, re, threading\n"
        "thread = threading.Thread(target=lambda: print('from a thread'))\nthread.start(); thread.join()\n"
        "assert math.gcd(12, 18) == 6\n"
    )
    assert (outcome.status, outcome.output) == ("passed", "from a thread\n")


@pytest.mark.parametrize(
    "source",
    [
        "assert 1 == 2",
        "import sys; sys.exit(0)",  # before what comes after it
        "import os; os._exit(0)",
        "def f(:",
        "raise KeyboardInterrupt",
    ],
)
def test_a_program_that_does_not_come_to_its_end_fails(source: str) -> None:
    assert run(source).status == "failed"


def test_a_program_that_crashes_the_interpreter_is_told_apart() -> None:
    assert run("import ctypes; ctypes.string_at(0)").status == "killed"


def test_an_endless_program_is_ended_in_time() -> None:
    began = time.monotonic()
    assert run("while True: pass", seconds=0.5).status == "timeout"
    assert run("import time; time.sleep(60)", seconds=0.5).status == "timeout"
    assert time.monotonic() - began < 10


def test_a_fork_bomb_makes_no_process() -> None:
    outcome = run("import os\nwhile True:\n    os.fork()")
    assert (outcome.status, "PermissionError" in outcome.output) == ("failed", True)
    outcome = run("import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1)'])")
    assert (outcome.status, "PermissionError" in outcome.output) == ("failed", True)


def test_a_memory_bomb_meets_its_limit() -> None:
    outcome = run("held = []\nwhile True: held.append(bytearray(1 << 20))", seconds=20)
    assert (outcome.status, "MemoryError" in outcome.output) == ("failed", True)


def test_endless_output_is_cut_off() -> None:
    outcome = run("while True: print('x' * 1000)", seconds=20)
    assert outcome.status == "output"
    assert len(outcome.output) < OUTPUT_BYTES


def test_files_can_be_read_but_not_written_deleted_or_renamed(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("still here")
    assert run(f"assert open({str(kept)!r}).read() == 'still here'").status == "passed"
    for attempt in (
        f"open({str(kept)!r}, 'w')", f"open({str(kept)!r}, 'a')", f"open({str(tmp_path / 'new')!r}, 'x')",
        f"import os; os.remove({str(kept)!r})", f"import os; os.rename({str(kept)!r}, '/tmp/taken')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})", f"import os; os.truncate({str(kept)!r}, 0)",
        f"import os; os.chmod({str(kept)!r}, 0)", f"import os; os.symlink('/etc/passwd', {str(tmp_path / 'link')!r})",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})", "import tempfile; tempfile.TemporaryFile()",
    ):  # fmt: skip
        outcome = run(attempt)
        assert outcome.status == "failed", attempt
        assert "PermissionError" in outcome.output or "FileNotFoundError" in outcome.output, attempt
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert kept.read_text() == "still here"


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))")
    assert (outcome.status, "PermissionError" in outcome.output) == ("failed", True)


def test_other_processes_cannot_be_signalled() -> None:
    assert "PermissionError" in run("import os, signal; os.kill(os.getppid(), signal.SIGKILL)").output
    assert "PermissionError" in run("import os, signal; os.kill(-1, signal.SIGKILL)").output


def test_a_program_does_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert run("import os; assert 'OPENAI_API_KEY' not in os.environ").status == "passed"
