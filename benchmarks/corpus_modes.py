"""What `benchmarks.corpus` measures beside plain byte-level BPE, each alone: a gigabyte of it, filters and duplicates,
the other kinds of tokenizers, one worker against two, the loader, and memory."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.corpus_data import enlarge, make_jsonl
from benchmarks.programs import WORKERS, run_module, run_peer

Rows = list[list[str]]
Measured = tuple[dict[str, Any], str]
"""Figures, and what a page says of them."""

_REFINED_BYTES = 20_000_000
_TOKENIZERS_BYTES = 30_000_000
_WORKERS_BYTES = 300_000_000
_LARGE_BYTES = 1_000_000_000
_MEMORY_BYTES = {"100 MB": 100_000_000, "5 GB": 5_000_000_000}
_QUICK_BYTES = 10_000_000
_QUICK_SHARE = 10
_SPANS = 10_000


def _source(options: argparse.Namespace, size_bytes: int) -> tuple[Path, Path, float]:
    """Scratch folder, source folder and megabytes of real JSONL of about this size."""
    wanted = min(size_bytes, _QUICK_BYTES) if options.quick else size_bytes
    work: Path = options.work / ("whole" if wanted == sys.maxsize else f"{wanted // 1_000_000}mb")
    return work, work / "source", make_jsonl(options.data, work / "source", wanted) / 1e6


def _ours(source: Path, work: Path, *options: Any) -> dict[str, Any]:
    return run_module("benchmarks.corpus_ours", source, work, *options)


def _warm(corpus: dict[str, Any], what: str = "seconds") -> float:
    """Median of the runs in processes that have our modules loaded."""
    return float(median(corpus[what][1:]))


def _table(heads: list[str], rows: Rows) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}", *(f"| {' | '.join(r)} |" for r in rows)]
    return "\n".join(lines)


def large(options: argparse.Namespace) -> Measured:
    """A corpus of 1 GB (real text, repeated with perturbation), byte-level BPE; against `datasets.map`, the faster peer
    of the plain mode, run once."""
    work, source, _ = _source(options, sys.maxsize)
    larger = work / "large"
    shutil.rmtree(larger, ignore_errors=True)
    size = enlarge(source, larger, _LARGE_BYTES // (_QUICK_SHARE if options.quick else 1)) / 1e6
    made = _ours(larger, work, "--workers", WORKERS, "--runs", 4)
    ours = made["corpora"][str(WORKERS)]
    peer = run_peer("datasets", options.peers, larger, made["tokenizer"], work, 1)
    seconds = _warm(ours)
    rows = [["ganymede", f"{seconds:.1f}", f"{size / seconds:.1f}", "1.00x", f"{ours['tokens']:,} tokens"]]
    if "missing" not in peer:
        theirs = peer["runs"][0]["seconds"]
        same = "equal ids" if peer["runs"][0]["ids"] == ours["ids"] else "DIFFERENT IDS"
        name = f"datasets {peer['version']}"
        rows.append([name, f"{theirs:.1f}", f"{size / theirs:.1f}", f"{theirs / seconds:.2f}x", same])
    shutil.rmtree(larger)
    page = _table(["", "seconds", "MB/s", "time against ours", ""], rows)
    return {"megabytes": size, "ours": ours, "datasets": peer}, f"{page}\n\n{peer.get('missing', '')}\n"


def refined(options: argparse.Namespace) -> Measured:
    """Gopher's filters, exact and near duplicates removed, byte-level BPE; against datatrove's own steps for it."""
    work, source, size = _source(options, _REFINED_BYTES)
    runs = 1 if options.quick else options.runs
    made = _ours(source, work, "--refined", "--workers", WORKERS, "--runs", 1 + max(runs, 3))
    ours = made["corpora"][str(WORKERS)]
    peer = run_peer("datatrove", options.peers, source, made["tokenizer"], work, runs, refined=True)
    seconds = _warm(ours)
    rows = [["ganymede", f"{seconds:.2f}", f"{size / seconds:.1f}", f"{ours['documents']:,}", "1.00x"]]
    if "missing" not in peer:
        theirs = median(run["seconds"] for run in peer["runs"])
        kept = peer["runs"][0]["documents"]
        ratio = f"{theirs / seconds:.2f}x"
        rows.append([f"datatrove {peer['version']}", f"{theirs:.2f}", f"{size / theirs:.1f}", f"{kept:,}", ratio])
    page = _table(["", "seconds", "MB/s", "documents left", "time against ours"], rows)
    note = "Which documents are left differs: datatrove's words are spaCy's, ours are runs without white space."
    return {"megabytes": size, "ours": ours, "datatrove": peer}, f"{page}\n\n{note} {peer.get('missing', '')}\n"


def tokenizers(options: argparse.Namespace) -> Measured:
    """WordPiece and Unigram; against `datasets.map` with the same tokenizer.json, ids compared document by document."""
    work, source, size = _source(options, _TOKENIZERS_BYTES)
    runs = 1 if options.quick else options.runs
    figures: dict[str, Any] = {"megabytes": size}
    rows: Rows = []
    missing = ""
    for algorithm in ("wordpiece", "unigram"):
        made = _ours(source, work, "--algorithm", algorithm, "--workers", WORKERS, "--runs", 1 + max(runs, 3))
        ours = made["corpora"][str(WORKERS)]
        peer = run_peer("datasets", options.peers, source, made["tokenizer"], work, runs)
        figures[algorithm] = {"ours": ours, "datasets": peer}
        seconds = _warm(ours)
        rows.append([f"{algorithm}, ganymede", f"{seconds:.2f}", f"{size / seconds:.1f}", "1.00x", ours["encoder"]])
        missing = peer.get("missing", "")
        if not missing:
            theirs = median(run["seconds_map"] for run in peer["runs"])
            same = "equal ids" if {run["ids"] for run in peer["runs"]} == {ours["ids"]} else "DIFFERENT IDS"
            name = f"{algorithm}, datasets {peer['version']} `map` alone"
            rows.append([name, f"{theirs:.2f}", f"{size / theirs:.1f}", f"{theirs / seconds:.2f}x", same])
    return figures, f"{_table(['', 'seconds', 'MB/s', 'time against ours', ''], rows)}\n\n{missing}\n"


def workers(options: argparse.Namespace) -> Measured:
    """One worker process against two, workers warm. They work while documents are encoded (filtered, signed); listing,
    joining and merging are the driver's.

    Core seconds are what the machine's cores worked meanwhile with two workers, for all processes. Two cores can take
    no less than half of them: that is the greatest ratio there can be here.
    """
    work, source, _ = _source(options, sys.maxsize)
    larger = work / "larger"
    if not larger.exists():
        enlarge(source, larger, _WORKERS_BYTES // (_QUICK_SHARE if options.quick else 1))
    figures: dict[str, Any] = {}
    rows: Rows = []
    for name, folder, flags in (("plain", larger, []), ("filters and duplicates", source, ["--refined"])):
        size = sum(path.stat().st_size for path in folder.glob("*.jsonl")) / 1e6
        made = _ours(folder, work, *flags, "--workers", 1, 2, "--runs", 4, "--no-ids")
        corpora = made["corpora"]
        figures[name] = {"megabytes": size, **corpora}
        same = "equal" if corpora["1"]["digest"] == corpora["2"]["digest"] else "DIFFERENT"
        for label, what in ((f"{name}, the whole stage", "seconds"), (f"{name}, encoding", "encoding")):
            one, two = _warm(corpora["1"], what), _warm(corpora["2"], what)
            busy = _warm(corpora["2"], "core_seconds")
            most = [f"{busy:.2f}", f"{2 * one / busy:.2f}x"] if what == "seconds" else ["", ""]
            rows.append([label, f"{size:.0f}", f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}x", *most, same])
    size = sum(path.stat().st_size for path in larger.glob("*.jsonl")) / 1e6
    bare = {n: run_module("benchmarks.corpus_bare", larger, made["tokenizer"], "--workers", n) for n in (1, 2)}
    one, two = (median(run["seconds"] for run in bare[n]["runs"]) for n in (1, 2))
    rows.append(["the bare loop", f"{size:.0f}", f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}x", "", "", ""])
    figures["bare"] = bare
    heads = ["", "MB", "1 worker, s", "2 workers, s", "ratio", "core seconds", "greatest ratio", "digests"]
    return figures, _table(heads, rows) + "\n"


def loader(options: argparse.Namespace) -> Measured:
    """Batches in training order by one thread, whose rows lie anywhere in the corpus (processor time)."""
    work, source, size = _source(options, sys.maxsize)
    found = _ours(source, work, "--workers", WORKERS, "--runs", 1, "--loader")["loader"]
    return {"megabytes": size, "loader": found}, loader_table(found)


def loader_table(found: list[dict[str, Any]]) -> str:
    """The loader's figures."""
    rows = []
    for shape in found:
        rates = shape["million_tokens_per_second"]
        name = f"{shape['rows']} x {shape['row_tokens']}"
        rows.append([name, f"{rates['batch']:.0f}", f"{rates['packed']:.0f}", f"{shape['restore_ms']:.0f} ms"])
    heads = ["batch", "million tokens/s", "with document bounds", "open and restore at step 123,456"]
    return _table(heads, rows) + "\n"


def memory(options: argparse.Namespace) -> Measured:
    """Peak resident memory for 100 MB and for 5 GB, and with ten thousand spans."""
    work, source, _ = _source(options, sys.maxsize)
    figures: dict[str, Any] = {}
    rows: Rows = []
    for name, size_bytes in _MEMORY_BYTES.items():
        wanted = size_bytes // (_QUICK_SHARE if options.quick else 1)
        larger = work / "large"
        shutil.rmtree(larger, ignore_errors=True)
        size = enlarge(source, larger, wanted)
        cuts: dict[str, list[Any]] = {name: []}
        if name == "100 MB":
            spans = _SPANS // (_QUICK_SHARE if options.quick else 1)
            cuts[f"{name} in {spans:,} spans"] = ["--span-bytes", max(4096, size // spans)]
        for label, flags in cuts.items():
            chosen = (*flags, "--workers", WORKERS, "--runs", 1, "--no-ids", "--memory")
            made = _ours(larger, work, *chosen)["corpora"][str(WORKERS)]
            figures[label] = {"megabytes": size / 1e6, **made}
            seconds = f"{made['seconds'][0]:.0f}"
            rows.append([label, f"{made['spans']:,}", f"{made['driver_mb']}", f"{made['worker_mb']}", seconds])
        shutil.rmtree(larger)
    shutil.rmtree(work / "store" / "corpus")
    return figures, _table(["", "spans", "driver, MB", "largest worker, MB", "seconds"], rows) + "\n"


MODES: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "large": large,
    "refined": refined,
    "tokenizers": tokenizers,
    "workers": workers,
    "loader": loader,
    "memory": memory,
}
