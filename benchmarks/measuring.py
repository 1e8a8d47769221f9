"""What every benchmark needs: the machine, peak memory of a tree of processes, results that are kept."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, memory and Python."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    return {name: version(name) for name in packages}


@dataclass
class Peaks:
    """Highest resident memory seen, in MB."""

    driver: float = 0.0
    workers: dict[int, float] = field(default_factory=dict)
    """By process id; only processes that did some work."""

    @property
    def worker(self) -> float:
        """Of the largest worker."""
        return max(self.workers.values(), default=0.0)


@contextmanager
def peaks(worker_name: str) -> Iterator[Peaks]:
    """Watches this process and its descendants whose command line holds `worker_name`, twenty times a second."""
    result, done = Peaks(), threading.Event()
    driver = psutil.Process()

    def watch() -> None:
        while not done.wait(0.05):
            result.driver = max(result.driver, driver.memory_info().rss / 1e6)
            for child in driver.children(recursive=True):
                try:
                    if worker_name in " ".join(child.cmdline()):
                        resident = child.memory_info().rss / 1e6
                        result.workers[child.pid] = max(result.workers.get(child.pid, 0.0), resident)
                except psutil.Error:  # it ended meanwhile
                    continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()


def keep(name: str, document: Mapping[str, Any], page: str) -> Path:
    """Writes `document` and `page` as results of today; returns the page's path."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"{name}-{datetime.now(UTC):%Y-%m-%d}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=2) + "\n")
    path = RESULTS / f"{stem}.md"
    path.write_text(page)
    return path


def command() -> str:
    """How this process was started, without machine paths."""
    module = Path(sys.argv[0]).stem
    return shlex.join(
        ["python", "-m", f"benchmarks.{module}", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]
    )
