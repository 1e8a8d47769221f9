"""The least that could be done: read JSONL, encode with gigatoken, write token files; nothing checked, nothing kept.

It is the ceiling for what promises more. Run as a process of its own; prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np

from benchmarks.corpus_peers import fingerprint

END_OF_TEXT_ID = 0


def _work(files: list[Path], tokenizer: str, out: Path, barrier: Barrier) -> None:
    encode = gigatoken.Tokenizer.from_json(tokenizer).encode
    end = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    barrier.wait()
    for path in files:
        lengths = []
        with path.open("rb") as lines, (out / f"{path.stem}.bin").open("wb") as file:
            for line in lines:
                ids = encode(json.loads(line)["text"].encode()).astype(np.uint16)
                file.write(ids.data)
                file.write(end.data)
                lengths.append(len(ids) + 1)
        np.array(lengths, dtype=np.int64).tofile(out / f"{path.stem}.lengths")
    barrier.wait()


def run(source: Path, tokenizer: str, workers: int, out: Path) -> dict[str, Any]:
    """One run; `seconds` once the processes are up, `seconds_cold` with their start."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers + 1)
    files = sorted(source.glob("*.jsonl"))
    started = time.perf_counter()
    processes = [
        context.Process(target=_work, args=(files[n::workers], tokenizer, out, barrier)) for n in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    ready = time.perf_counter()
    barrier.wait()
    ended = time.perf_counter()
    for process in processes:
        process.join()
    documents: list[Any] = []
    for path in files:
        lengths = np.fromfile(out / f"{path.stem}.lengths", np.int64)
        documents += np.split(np.fromfile(out / f"{path.stem}.bin", np.uint16), np.cumsum(lengths)[:-1])
    return {"seconds": ended - ready, "seconds_cold": ended - started, **fingerprint(documents)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = json.dumps({**json.loads(arguments.tokenizer.read_bytes()), "added_tokens": []})
    runs = []
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory(dir=arguments.source.parent) as out:
            runs.append(run(arguments.source, tokenizer, arguments.workers, Path(out)))
    json.dump({"runs": runs}, sys.stdout)


if __name__ == "__main__":
    main()
