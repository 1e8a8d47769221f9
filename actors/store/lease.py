"""Leases: of two runs of one stage, one works and the other is told so.

A lease is a folder of numbered files; the highest number holds it. Creating the next number is exclusive, so two
claimants cannot both get it. The holder touches its file every few seconds. A claimant may go past a holder whose
process is gone (same host) or whose file has not been touched for `TTL_SECONDS` (another host); the earlier holder
finds the higher number at its next `check` and stops before it writes (fencing).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs.errors import LeaseError

TTL_SECONDS = 30.0
HEARTBEAT_SECONDS = 3.0


@dataclass(frozen=True)
class Lease:
    """A held lease. It can be sent to other processes, which may call `check` too."""

    folder: Path
    number: int
    nonce: str

    @property
    def path(self) -> Path:
        """The numbered file."""
        return self.folder / f"{self.number}.json"

    def check(self) -> None:
        """Raises `LeaseError` if the lease was taken over or given up."""
        holder = _highest(self.folder)
        if holder != self.number or _read(self.path).get("nonce") != self.nonce:
            raise LeaseError(
                f"another run has taken over {self.folder.name} (lease {holder}, ours was {self.number})",
                next_step="let that run finish; this one wrote nothing after losing the lease",
            )


@contextmanager
def hold(folder: Path) -> Iterator[Lease]:
    """Holds the lease in `folder` for the duration of the block, with a heartbeat in a thread.

    Raises:
        LeaseError: a living run holds it.
    """
    lease = _claim(folder)
    stop = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(lease, stop), name="lease-heartbeat", daemon=True)
    heartbeat.start()
    try:
        yield lease
    finally:
        stop.set()
        heartbeat.join()
        if _read(lease.path).get("nonce") == lease.nonce:
            lease.path.unlink()


def _claim(folder: Path) -> Lease:
    folder.mkdir(parents=True, exist_ok=True)
    number = _highest(folder)
    if number:
        _refuse_if_alive(folder / f"{number}.json")
    lease = Lease(folder, number + 1, uuid.uuid4().hex)
    owner = {
        "nonce": lease.nonce,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
    }
    try:
        with lease.path.open("x") as file:
            json.dump(owner, file)
    except FileExistsError:
        raise LeaseError(
            f"another run took {folder.name} at the same moment", next_step="run the same command again"
        ) from None
    for old in range(1, number + 1):
        (folder / f"{old}.json").unlink(missing_ok=True)
    return lease


def _refuse_if_alive(path: Path) -> None:
    owner = _read(path)
    try:
        idle_seconds = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    same_host = owner.get("host") == socket.gethostname()
    alive = _process_lives(owner) if same_host else idle_seconds < TTL_SECONDS
    if alive:
        raise LeaseError(
            f"{path.parent.name} is being made by process {owner.get('pid')} on {owner.get('host')}",
            next_step="wait for that run; the same command then reuses what it made",
        )


def _process_lives(owner: dict[str, object]) -> bool:
    try:
        process = psutil.Process(int(str(owner["pid"])))
        return process.create_time() == owner["process_started"] and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False


def _beat(lease: Lease, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            os.utime(lease.path)
        except FileNotFoundError:  # taken over: `check` tells the run
            return


def _highest(folder: Path) -> int:
    numbers = [int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit()]
    return max(numbers, default=0)


def _read(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # gone, or a claimant killed in mid-write: nobody's
        return {}
    return value if isinstance(value, dict) else {}
