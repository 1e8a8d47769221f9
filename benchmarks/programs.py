"""The programs that are compared: ours in this environment, the peers in one of their own; each prints one JSON
document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKERS = 2
PEERS = {"datasets": "5.2.0", "datatrove": "0.10.1"}


def run_module(module: str, *arguments: Any) -> dict[str, Any]:
    """What a module of this environment prints."""
    return _run([sys.executable, "-m", module, *map(str, arguments)])


def run_peer(
    name: str, python: str | None, source: Path, tokenizer: str, work: Path, runs: int, *, refined: bool = False
) -> dict[str, Any]:
    """What `corpus_peers` prints for a peer, or `missing`: why it was not run."""
    if python is None:
        return {"missing": f"not run: give --peers an interpreter with {name}=={PEERS[name]}"}
    probe = subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False)
    if probe.returncode:
        return {"missing": f"not run: {Path(python).name} has no {name}; pip install {name}=={PEERS[name]}"}
    script = ROOT / "benchmarks/corpus_peers.py"
    options = ["--workers", str(WORKERS), "--runs", str(runs), *(["--refined"] if refined else [])]
    return _run([python, str(script), name, str(source), tokenizer, str(work / "peers"), *options])


def _run(arguments: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\nfailed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
