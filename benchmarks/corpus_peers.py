"""JSONL to token files with `datasets.map` and with datatrove, plain or refined; run by the interpreter that has them.

Prints one JSON document. Nothing of Ganymede is imported, so that the two need not share an environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "RAYON_NUM_THREADS": "1",  # equal cores: the processes are the parallelism
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
}


def fingerprint(documents: Iterable[Any]) -> dict[str, Any]:
    """Documents, tokens, and a digest over the token ids of every document, whatever their order."""
    import numpy as np

    digests, tokens = [], 0
    for ids in documents:
        array = np.asarray(ids, dtype="<u4")
        tokens += len(array)
        digests.append(hashlib.blake2b(array.tobytes(), digest_size=16).digest())
    whole = hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()
    return {"documents": len(digests), "tokens": tokens, "ids": whole}


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def _encode(batch: dict[str, list[str]], path: str, end_of_text: int) -> dict[str, list[list[int]]]:
    encoded = _tokenizer(path).encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"ids": [[*e.ids, end_of_text] for e in encoded]}


def run_datasets(source: Path, tokenizer: Path, work: Path, workers: int) -> dict[str, Any]:
    """Loads the JSONL and maps it in `workers` processes; tokens end up in Arrow files of its cache."""
    import datasets

    datasets.disable_progress_bars()
    files = [str(p) for p in sorted(source.glob("*.jsonl"))]
    end_of_text = _tokenizer(str(tokenizer)).token_to_id("<|endoftext|>")
    started = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(work), num_proc=workers)
    read = time.perf_counter()
    mapped = loaded.map(
        _encode,
        batched=True,
        num_proc=workers,
        remove_columns=loaded.column_names,
        fn_kwargs={"path": str(tokenizer), "end_of_text": end_of_text},
        features=datasets.Features({"ids": datasets.List(datasets.Value("uint16"))}),
    )
    ended = time.perf_counter()
    columns = mapped.with_format("arrow").iter(256)
    documents = (row.values.to_numpy() for table in columns for row in table["ids"])
    return {"seconds": ended - started, "seconds_map": ended - read, **fingerprint(documents)}


def run_datatrove(source: Path, tokenizer: Path, work: Path, workers: int) -> dict[str, Any]:
    """Reads and tokenizes, a task a file, `workers` at a time; tokens end up in `.ds` files."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(source), glob_pattern="*.jsonl"),
        DocumentTokenizer(
            str(work / "tokens"),
            tokenizer_name_or_path=str(tokenizer),
            eos_token="<|endoftext|>",
            shuffle_documents=False,
            save_final_metadata=False,
        ),
    ]
    tasks = len(list(source.glob("*.jsonl")))
    started = time.perf_counter()
    LocalPipelineExecutor(steps, tasks=tasks, workers=workers, logging_dir=str(work / "logs")).run()
    ended = time.perf_counter()
    return {"seconds": ended - started, **fingerprint(_datatrove_documents(work / "tokens"))}


def _datatrove_documents(folder: Path) -> list[Any]:
    import numpy as np

    documents: list[Any] = []
    for path in sorted(folder.glob("*.ds")):
        ends = np.fromfile(f"{path}.index", "<u8").astype(np.int64)
        documents += np.split(np.fromfile(path, "<u2"), ends[:-1])
    return documents


def run_datatrove_refined(source: Path, tokenizer: Path, work: Path, workers: int) -> dict[str, Any]:
    """Gopher's filters, near-duplicates by MinHash in four steps, then tokens, as datatrove's examples chain them."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig()
    files = len(list(source.glob("*.jsonl")))
    filtered, signatures, buckets, removed, tokens = (
        str(work / name) for name in ("filtered", "signatures", "buckets", "removed", "tokens")
    )
    read = JsonlReader(str(source), glob_pattern="*.jsonl")
    judge = [read, GopherQualityFilter(), GopherRepetitionFilter(), JsonlWriter(filtered, compression=None)]
    encode = DocumentTokenizer(
        tokens,
        tokenizer_name_or_path=str(tokenizer),
        eos_token="<|endoftext|>",
        shuffle_documents=False,
        save_final_metadata=False,
    )
    steps: list[tuple[list[Any], int]] = [
        (judge, files),
        ([JsonlReader(filtered), MinhashDedupSignature(signatures, config=config)], files),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ([MinhashDedupCluster(buckets, removed, config=config)], 1),
        ([JsonlReader(filtered), MinhashDedupFilter(removed), encode], files),
    ]
    started = time.perf_counter()
    for number, (pipeline, tasks) in enumerate(steps):
        logs = str(work / f"logs-{number}")
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=logs).run()
    ended = time.perf_counter()
    return {"seconds": ended - started, **fingerprint(_datatrove_documents(Path(tokens)))}


PEERS = {"datasets": run_datasets, "datatrove": run_datatrove}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("source", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--refined", action="store_true", help="datatrove only: filters and near-duplicates first")
    arguments = parser.parse_args()
    run = run_datatrove_refined if arguments.refined else PEERS[arguments.peer]
    runs = []
    for number in range(arguments.runs):
        folder = arguments.work / f"{arguments.peer}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        runs.append(run(arguments.source, arguments.tokenizer, folder, arguments.workers))
        shutil.rmtree(folder)
    json.dump({"version": version(arguments.peer), "runs": runs}, sys.stdout)


if __name__ == "__main__":
    main()
