"""Raw JSONL to token shards: the corpus stage against `datasets.map`, datatrove and a bare gigatoken loop.

    python -m benchmarks.corpus [--mode MODE] [--quick] [--json] [--peers PYTHON] [--data FOLDER]

Other modes measure a gigabyte (`large`), filters and duplicates (`refined`), WordPiece and Unigram (`tokenizers`), one
worker against two (`workers`), the loader and memory.

All of them read the same files, use the same tokenizer.json and the same number of processes, and the ids of every
document are compared. The peers live in an environment of their own:

    python3 -m venv peers && peers/bin/pip install datasets==5.2.0 'datatrove[io,processing]==0.10.1' spacy==3.8.18
    python -m benchmarks.corpus --peers peers/bin/python       # or GANYMEDE_BENCHMARK_PEERS=peers/bin/python

A full run keeps its results in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.corpus_data import make_jsonl
from benchmarks.corpus_modes import MODES, loader_table
from benchmarks.measuring import command, keep, machine, versions
from benchmarks.programs import PEERS, ROOT, WORKERS, run_module, run_peer

QUICK_BYTES = 10_000_000
PACKAGES = ("ray", "gigatoken", "tokenizers", "pyarrow", "numpy")


def main() -> int:
    """Prints a table (or JSON); 1 if any two of the programs came to different tokens."""
    options = _options()
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command(),
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "processes": WORKERS,
        "runs": 1 if options.quick else options.runs,
    }
    if options.mode == "plain":
        document |= _plain(options)
        page = _page(document)
        agreed = len(_ids(document)) == 1
    else:
        measure = MODES[options.mode]
        figures, found = measure(options)
        document |= figures
        page = "\n".join([f"# Corpus: {options.mode}", "", *_facts(document), str(inspect.getdoc(measure)), "", found])
        agreed = "DIFFERENT" not in page
    if not options.quick:
        name = "corpus" if options.mode == "plain" else f"corpus-{options.mode}"
        print(f"kept as {keep(name, document, page).relative_to(ROOT)}", file=sys.stderr)
    print(json.dumps(document, indent=2) if options.json else page)
    return 0 if agreed else 1


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """Byte-level BPE by all programs."""
    work = options.work / ("quick" if options.quick else "full")
    source = work / "source"
    jsonl_bytes = make_jsonl(options.data, source, QUICK_BYTES if options.quick else sys.maxsize)
    runs = 1 if options.quick else options.runs
    tokenizer = run_module("benchmarks.corpus_ours", source, work, "--tokenizer-only")["tokenizer"]
    bare = run_module("benchmarks.corpus_bare", source, tokenizer, "--workers", WORKERS, "--runs", max(runs, 3))
    flags = ("--workers", 1, WORKERS, "--runs", 1 + max(runs, 3), "--loader", "--memory")
    ours = run_module("benchmarks.corpus_ours", source, work, *flags)
    peers = {name: run_peer(name, options.peers, source, tokenizer, work, runs) for name in PEERS}
    return {"jsonl_bytes": jsonl_bytes, "bare": bare, "ours": ours["corpora"], "loader": ours["loader"], "peers": peers}


def _facts(document: dict[str, Any]) -> list[str]:
    """When, on what and by which command; lines of Markdown."""
    facts = document["machine"]
    return [
        f"{document['date']}; {facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB; load before "
        f"{facts['load_before']}; Python {facts['python']}, "
        + ", ".join(f"{name} {number}" for name, number in document["versions"].items()),
        "",
        f"    {document['command']}",
        "",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("plain", *MODES), default="plain", help="what is measured")
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, one run, nothing kept")
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument("--runs", type=int, default=3, help="runs of each peer; the median counts")
    parser.add_argument("--peers", default=os.environ.get("GANYMEDE_BENCHMARK_PEERS"), help="interpreter of the peers")
    data = os.environ.get("GANYMEDE_DATA", ROOT.parent / "shared/data")
    parser.add_argument("--data", type=Path, default=Path(data), help="folder that holds eltec-eng/")
    parser.add_argument("--work", type=Path, default=ROOT / ".ganymede/benchmarks", help="scratch folder")
    return parser.parse_args()


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
    lines = [
        "# Corpus: raw text to token shards",
        "",
        *_facts(document),
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
        loader_table(document["loader"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
