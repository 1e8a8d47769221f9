"""What a corpus takes of memory: bounded for the driver however many spans there are, and for a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

SPAN_BYTES = 4096
SPANS = 10_000
DRIVER_MB, WORKER_MB = 500, 1000
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Measured:
    """A finished run of the command line."""

    summary: dict[str, Any]
    driver_mb: float
    worker_mb: float


def _run(recipe: dict[str, Any], home: Path) -> Measured:
    """Runs a recipe in a process of its own; the corpus' summary, and the highest resident memory that was seen."""
    path = home.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "GANYMEDE_HOME": str(home)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "infra.cli.main", "run", str(path), "--json", "--tracker", "none"]
    with home.with_suffix(".json").open("w+") as output, home.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=log)
        watched, driver, worker = psutil.Process(process.pid), 0, 0
        while process.poll() is None:
            try:
                driver = max(driver, watched.memory_info().rss)
                for child in watched.children(recursive=True):
                    if " ".join(child.cmdline()).startswith("ray::"):
                        worker = max(worker, child.memory_info().rss)
            except psutil.NoSuchProcess:  # it ended meanwhile
                pass
            time.sleep(0.2)
        log.seek(0)
        assert process.returncode == 0, log.read()[-3000:]
        output.seek(0)
        outcomes = {o["stage"]: o["summary"] for o in json.load(output)["outcomes"]}
    return Measured(outcomes["corpus"], driver / 1e6, worker / 1e6)


def test_ten_thousand_spans_take_no_more_of_the_driver_than_a_hundred_but_little(tmp_path: Path) -> None:
    measured = {}
    for spans in (SPANS // 100, SPANS):
        path = tmp_path / f"{spans}.jsonl"
        with path.open("w") as lines:
            for number in range(spans * SPAN_BYTES // 1000):
                text = f"Document {number}: " + " ".join(f"word{number * k % 7919}" for k in range(1, 110))
                lines.write(json.dumps({"text": text[:970]}) + "\n")
        source = {"path": str(path)}
        corpus = {"tokenizer": "tokenizer", "source": source, "span_bytes": SPAN_BYTES, "dedup": {"near": {}}}
        tokenizer = {"source": source, "vocab_size": 400, "sample_bytes": 100_000}
        recipe = {"name": "spans", "stages": {"tokenizer": tokenizer, "corpus": corpus}}
        measured[spans] = _run(recipe, tmp_path / f"home-{spans}")
        assert measured[spans].summary["spans"] >= 0.95 * spans
        assert measured[spans].driver_mb < DRIVER_MB
        assert measured[spans].worker_mb < WORKER_MB
    few, many = measured.values()
    assert many.driver_mb < few.driver_mb + 150
    assert many.worker_mb < few.worker_mb + 150
