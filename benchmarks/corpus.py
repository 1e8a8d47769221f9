"""Raw JSONL to token shards: the corpus stage against `datasets.map`, datatrove and a bare gigatoken loop.

    python -m benchmarks.corpus [--quick] [--json] [--peers PYTHON] [--data FOLDER]

All of them read the same files, use the same tokenizer.json and the same number of processes, and the ids of every
document are compared. The peers live in an environment of their own:

    python3 -m venv peers && peers/bin/pip install datasets==5.2.0 'datatrove[processing]==0.10.1'
    python -m benchmarks.corpus --peers peers/bin/python       # or GANYMEDE_BENCHMARK_PEERS=peers/bin/python

A full run keeps its results in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.corpus_data import make_jsonl
from benchmarks.measuring import command, keep, machine, versions

ROOT = Path(__file__).parents[1]
WORKERS = 2
QUICK_BYTES = 10_000_000
PEERS = {"datasets": "5.2.0", "datatrove": "0.10.1"}
PACKAGES = ("ray", "gigatoken", "tokenizers", "pyarrow", "numpy")


def main() -> int:
    """Prints a table (or JSON); 1 if any two of the programs came to different tokens."""
    options = _options()
    work = options.work / ("quick" if options.quick else "full")
    source = work / "source"
    jsonl_bytes = make_jsonl(options.data, source, QUICK_BYTES if options.quick else sys.maxsize)
    runs = 1 if options.quick else options.runs

    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command(),
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "jsonl_bytes": jsonl_bytes,
        "processes": WORKERS,
        "runs": runs,
    }
    prepared = _python("benchmarks.corpus_ours", source, work, "--tokenizer-only")
    tokenizer = prepared["tokenizer"]
    document["bare"] = _python(
        "benchmarks.corpus_bare", source, tokenizer, "--workers", WORKERS, "--runs", max(runs, 3)
    )
    ours = _python("benchmarks.corpus_ours", source, work, "--workers", 1, WORKERS, "--runs", 1 + max(runs, 3))
    document |= {"ours": ours["corpora"], "loader": ours["loader"]}
    document["peers"] = {name: _peer(name, options.peers, source, tokenizer, work, runs) for name in PEERS}

    page = _page(document)
    if not options.quick:
        print(f"kept as {keep('corpus', document, page).relative_to(ROOT)}", file=sys.stderr)
    print(json.dumps(document, indent=2) if options.json else page)
    return 0 if len(_ids(document)) == 1 else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 MB, one run, nothing kept")
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument("--runs", type=int, default=3, help="runs of each peer; the median counts")
    parser.add_argument("--peers", default=os.environ.get("GANYMEDE_BENCHMARK_PEERS"), help="interpreter of the peers")
    data = os.environ.get("GANYMEDE_DATA", ROOT.parent / "shared/data")
    parser.add_argument("--data", type=Path, default=Path(data), help="folder that holds eltec-eng/")
    parser.add_argument("--work", type=Path, default=ROOT / ".ganymede/benchmarks", help="scratch folder")
    return parser.parse_args()


def _python(module: str, *arguments: Any) -> dict[str, Any]:
    """Runs a module of this environment; its standard output is one JSON document."""
    return _json([sys.executable, "-m", module, *map(str, arguments)])


def _json(arguments: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\nfailed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _peer(name: str, python: str | None, source: Path, tokenizer: str, work: Path, runs: int) -> dict[str, Any]:
    """What `corpus_peers` says, or why it was not run."""
    if python is None:
        return {"missing": f"not run: give --peers an interpreter with {name}=={PEERS[name]}"}
    probe = subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False)
    if probe.returncode:
        return {"missing": f"not run: {Path(python).name} has no {name}; pip install {name}=={PEERS[name]}"}
    script = ROOT / "benchmarks/corpus_peers.py"
    options = ["--workers", str(WORKERS), "--runs", str(runs)]
    return _json([python, str(script), name, str(source), tokenizer, str(work / "peers"), *options])


def _ids(document: dict[str, Any]) -> set[str]:
    """Digests over all token ids that the programs came to."""
    found = {run["ids"] for run in document["bare"]["runs"]} | {run["ids"] for run in document["ours"].values()}
    return found | {run["ids"] for peer in document["peers"].values() for run in peer.get("runs", ())}


def _page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    size = document["jsonl_bytes"] / 1e6
    ours = document["ours"][str(WORKERS)]
    warm = median(ours["seconds"][1:])
    bare = document["bare"]["runs"]
    rows = [
        ("ganymede corpus stage, workers warm", warm),
        ("ganymede corpus stage, first run on a new Ray cluster", ours["seconds"][0]),
        ("bare read + gigatoken + write loop, processes up", median(run["seconds"] for run in bare)),
        ("bare loop, with the start of its processes", median(run["seconds_cold"] for run in bare)),
    ]
    missing = []
    for name, peer in document["peers"].items():
        if "missing" in peer:
            missing.append(f"- {name}: {peer['missing']}")
            continue
        rows.append((f"{name} {peer['version']}", median(run["seconds"] for run in peer["runs"])))
        if "seconds_map" in peer["runs"][0]:
            rows.append((f"{name} {peer['version']}, `map` alone", median(run["seconds_map"] for run in peer["runs"])))
    same = "equal in every document" if len(_ids(document)) == 1 else "DIFFERENT"
    one = median(document["ours"]["1"]["seconds"][1:])
    facts = document["machine"]
    lines = [
        "# Corpus: raw text to token shards",
        "",
        f"{document['date']}; {facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB; load before "
        f"{facts['load_before']}; Python {facts['python']}, "
        + ", ".join(f"{name} {number}" for name, number in document["versions"].items()),
        "",
        f"    {document['command']}",
        "",
        f"{size:.1f} MB of JSONL: {ours['documents']:,} documents, novels by chapter and Python's standard library by "
        "file; "
        f"{ours['tokens']:,} tokens, byte-level BPE of 8,192 entries, {document['processes']} processes each; "
        f"medians of {document['runs']} runs (ours and the bare loop: {max(document['runs'], 3)}). Token ids: {same}.",
        "",
        "| | seconds | MB/s | time against ours, warm |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {seconds:.2f} | {size / seconds:.1f} | {seconds / warm:.2f}x |" for name, seconds in rows),
        "",
        *missing,
        f"- From 1 to {WORKERS} workers: {one:.2f} s to {warm:.2f} s, {one / warm:.2f}x.",
        f"- Peak resident memory: driver {ours['driver_mb']} MB, largest worker {ours['worker_mb']} MB. Encoder: "
        f"{ours['encoder']}.",
        f"- The same digest with 1 and {WORKERS} workers: {document['ours']['1']['digest'] == ours['digest']}.",
        "",
        "## Loader, one thread, rows in random order (processor time)",
        "",
        "| batch | million tokens/s | with document bounds | open and restore at step 123,456 |",
        "|---|---:|---:|---:|",
        *(
            f"| {row['rows']} x {row['row_tokens']} | {row['million_tokens_per_second']['batch']:.0f} "
            f"| {row['million_tokens_per_second']['packed']:.0f} | {row['restore_ms']:.0f} ms |"
            for row in document["loader"]
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
