"""JSONL to a published corpus artifact with the corpus stage, Ray already up; and what the loader makes of it.

Everything the stage promises is in the time: listing and hashing the source, the probe of the encoder, cleaning,
provenance, commit records, shards with checksums, the report, publication. Run as a process of its own; prints one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.tracker import NoTracker
from benchmarks.corpus_peers import fingerprint
from benchmarks.measuring import peaks
from configs.artifacts import Identity, Ref
from configs.schema.corpus import (
    CorpusConfig,
    DedupConfig,
    FiltersConfig,
    NearConfig,
    SourceConfig,
    TokenizerConfig,
)
from pipelines.corpus.loader import Loader
from pipelines.corpus.reading import ShardFolder, TokenStream
from pipelines.corpus.shards import CorpusIndex
from pipelines.corpus.tokenizer import Algorithm
from pipelines.stage import Stage, StageContext
from pipelines.stages.corpus import CorpusStage
from pipelines.stages.tokenizer import TokenizerStage

VOCAB_SIZE = 8192
LOADER_SHAPES = ((16, 256), (64, 1024))
LOADER_STEPS = 2000
_SETTLING_SECONDS = 2.5
"""A file that was changed just now might be changed again, and is hashed whenever it is listed."""


def _run(stage: Stage[Any], config: Any, inputs: dict[str, Artifact], work: Path, name: str) -> Artifact:
    """What the runner does around a stage, without leases and tracking."""
    kind = str(stage.artifact_kind)
    store = ArtifactStore(work / "store")
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("work", "out"):
        (folder / part).mkdir(parents=True)
    context = StageContext(
        name=name,
        work=folder / "work",
        out=folder / "out",
        run=NoTracker().run(name, name),
        progress=lambda progress: None,
        check_lease=lambda: None,
        store=store,
        home=work,
    )
    sources = stage.sources(config)
    summary = stage.run(config, inputs, context)
    digests = {role: artifact.digest for role, artifact in inputs.items()}
    artifact = store.publish(
        context.out,
        ref=Ref(kind, name, 1),
        identity=Identity(kind, stage.code_version, {}, digests, sources),
        config=config.model_dump(mode="json"),
        inputs=inputs,
        summary=summary,
        tracking_run=None,
        fence=lambda: None,
    )
    shutil.rmtree(folder)
    return artifact


def _tokenizer(source: SourceConfig, work: Path, algorithm: Algorithm) -> Artifact:
    """A tokenizer learned from the source; kept in `work`."""
    store = ArtifactStore(work / "store")
    if store.versions("tokenizer", algorithm):
        return store.get(f"tokenizer/{algorithm}@1")
    config = TokenizerConfig(source=source, vocab_size=VOCAB_SIZE, algorithm=algorithm)
    return _run(TokenizerStage(), config, {}, work, algorithm)


def _refined(config: CorpusConfig) -> CorpusConfig:
    """With the filters of Gopher, and without exact and near duplicates."""
    filters = FiltersConfig(rules=("gopher_quality", "gopher_repetition"))
    source = config.source.model_copy(update={"filters": filters})
    return config.model_copy(update={"source": source, "dedup": DedupConfig(near=NearConfig())})


def _corpora(
    config: CorpusConfig, tokenizer: Artifact, work: Path, workers: int, runs: int, *, ids: bool, memory: bool
) -> dict[str, Any]:
    """Times of `runs` runs on one Ray cluster; the first finds no worker process that has our modules loaded."""
    import ray

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    store = ArtifactStore(work / "store")

    def once() -> tuple[float, float, Artifact]:
        """Seconds, seconds of all the machine's cores together, and what was made."""
        for path in Path(config.source.path).glob("*.jsonl"):  # nothing may be known of them from the run before
            path.touch()
        time.sleep(_SETTLING_SECONDS)
        for number in store.versions("corpus", "bench"):
            store.remove(Ref("corpus", "bench", number))
        started, before = time.perf_counter(), _core_seconds()
        artifact = _run(CorpusStage(), config, {"tokenizer": tokenizer}, work, "bench")
        return time.perf_counter() - started, _core_seconds() - before, artifact

    done = [once() for _ in range(runs)]
    *_, artifact = done[-1]
    peak = {}
    if memory:  # looking at every process twenty times a second takes a share of the driver's core: a run of its own
        with peaks("ray::") as seen:
            *_, artifact = once()
        peak = {"driver_mb": round(seen.driver), "worker_mb": round(seen.worker)}
    ray.shutdown()
    return {
        "seconds": [seconds for seconds, _, _ in done],
        "core_seconds": [busy for _, busy, _ in done],
        "encoding": [made.manifest.summary["seconds_by_step"]["encode"] for _, _, made in done],
        "digest": artifact.digest,
        "encoder": artifact.manifest.summary.get("encoder"),
        "spans": artifact.manifest.summary.get("spans"),
        **peak,
        **(_fingerprint(artifact.path) if ids else {}),
    }


def _core_seconds() -> float:
    """What the cores have worked since the machine began, for whichever process."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.softirq)


def _fingerprint(corpus: Path) -> dict[str, Any]:
    index = CorpusIndex.load(corpus)
    documents: list[Any] = []
    for record in index.splits.values():
        stream = TokenStream(ShardFolder(corpus), record, index.block_bytes)
        tokens = np.concatenate([stream.reader(n).read(0, s.tokens) for n, s in enumerate(record.shards)])
        documents += np.split(tokens, stream.offsets()[1:-1])
    return fingerprint(documents)


def _loader(corpus: Path, rows: int, row_tokens: int) -> dict[str, Any]:
    """Processor time of this one thread: batches in training order, whose rows lie anywhere in the split."""

    def opened() -> Loader:
        return Loader.open(corpus, split="train", row_tokens=row_tokens, batch_rows=rows, seed=1)

    started = time.perf_counter()
    loader = opened()
    loader.batch(123_456)
    restored = time.perf_counter() - started
    rates = {}
    for name, read in (("batch", loader.batch), ("packed", loader.packed)):
        passes = []
        for part in range(3):
            started = time.process_time()
            for step in range(part * LOADER_STEPS, (part + 1) * LOADER_STEPS):
                read(step)
            passes.append(LOADER_STEPS * rows * row_tokens / 1e6 / (time.process_time() - started))
        rates[name] = float(np.median(passes))
    return {"rows": rows, "row_tokens": row_tokens, "restore_ms": restored * 1e3, "million_tokens_per_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--algorithm", choices=get_args(Algorithm), default="bpe")
    parser.add_argument("--refined", action="store_true", help="filters and duplicates too")
    parser.add_argument("--span-bytes", type=int)
    parser.add_argument("--no-ids", action="store_true", help="leave the tokens alone once they are published")
    parser.add_argument("--memory", action="store_true", help="one more run, whose memory is watched")
    parser.add_argument("--tokenizer-only", action="store_true")
    parser.add_argument("--loader", action="store_true", help="what the loader makes of the corpus, too")
    arguments = parser.parse_args()
    source = SourceConfig(path=str(arguments.source.absolute()), include=("*.jsonl",))
    tokenizer = _tokenizer(source, arguments.work, arguments.algorithm)
    result: dict[str, Any] = {"tokenizer": str(tokenizer.path / "tokenizer.json")}
    if not arguments.tokenizer_only:
        config = CorpusConfig(tokenizer="bench", source=source, span_bytes=arguments.span_bytes)
        config = _refined(config) if arguments.refined else config
        chosen = {"ids": not arguments.no_ids, "memory": arguments.memory}
        result["corpora"] = {
            workers: _corpora(config, tokenizer, arguments.work, workers, arguments.runs, **chosen)
            for workers in arguments.workers
        }
    if arguments.loader:
        corpus = ArtifactStore(arguments.work / "store").get("corpus/bench@1").path
        result["loader"] = [_loader(corpus, rows, row_tokens) for rows, row_tokens in LOADER_SHAPES]
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
