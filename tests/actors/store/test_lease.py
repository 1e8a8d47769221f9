"""Two runs of one stage do not race; a dead holder does not block."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.store import lease
from configs.errors import LeaseError

HOLD = """
import pathlib, sys, time
from actors.store import lease
with lease.hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_claimant_is_told_who_holds_it(tmp_path: Path) -> None:
    process = holder(tmp_path / "stage")
    try:
        with pytest.raises(LeaseError, match=f"process {process.pid} on"), lease.hold(tmp_path / "stage"):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_holder_is_passed_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path / "stage")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with lease.hold(tmp_path / "stage") as held:
        held.check()
        assert held.number == 2
    assert list((tmp_path / "stage").iterdir()) == []


def test_a_silent_holder_on_another_host_is_passed_after_the_time_to_live_and_fenced(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    other = folder / "1.json"
    other.write_text(json.dumps({"nonce": "theirs", "host": "elsewhere", "pid": 1, "process_started": 0.0}))
    with pytest.raises(LeaseError), lease.hold(folder):
        pass
    long_ago = time.time() - lease.TTL_SECONDS - 1
    os.utime(other, (long_ago, long_ago))
    with lease.hold(folder) as held:
        held.check()
        with pytest.raises(LeaseError, match="taken over"):
            lease.Lease(folder, 1, "theirs").check()


def test_the_holder_may_be_checked_from_another_process(tmp_path: Path) -> None:
    with lease.hold(tmp_path / "stage") as held:
        copy = pickle.loads(pickle.dumps(held.check))
        copy()
    with pytest.raises(LeaseError):
        copy()


def test_the_heartbeat_keeps_the_file_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    with lease.hold(tmp_path / "stage") as held:
        os.utime(held.path, (0, 0))
        deadline = time.time() + 5
        while held.path.stat().st_mtime < 1 and time.time() < deadline:
            time.sleep(0.02)
        assert held.path.stat().st_mtime > 1
