"""The merge: what was selected of the committed parts becomes shards, in the order of the plan.

Which documents a shard holds follows from their lengths alone, so every shard is a Ray task of its own: a terabyte is
merged by all workers, and whichever of them writes a shard, and how often it is killed meanwhile, it has the same
bytes. The driver reads the lengths, a few bytes a document.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.store.artifacts import sync_file
from configs.errors import StorageError
from pipelines.corpus.dedup import Positions
from pipelines.corpus.report import Tally
from pipelines.corpus.selection import SelectedPart, Selection
from pipelines.corpus.shards import (
    SPLITS,
    Lengths,
    Run,
    ShardRecord,
    Split,
    SplitRecord,
    cut_shards,
    read_batch,
    shard_name,
    write_shard,
)
from pipelines.corpus.tasks import run_bounded

_SYNCING_THREADS = 4


@dataclass(frozen=True)
class _Documents:
    """Documents of a part: rows `begin` to `end`, or the `rows` that are given."""

    path: Path
    begin: int
    end: int
    rows: Positions | None

    def read(self) -> pa.RecordBatch:
        batch = read_batch(self.path)
        return batch.slice(self.begin, self.end - self.begin) if self.rows is None else batch.take(pa.array(self.rows))


@dataclass(frozen=True)
class _Shard:
    """A shard that is to be written."""

    split: Split
    number: int
    folder: Path
    documents: tuple[_Documents, ...]


@dataclass(frozen=True)
class _Written:
    """A shard that is on disk."""

    split: Split
    number: int
    path: Path
    record: ShardRecord
    text_bytes: int
    tally: Tally


def merge_parts(
    selection: Selection, shard_tokens: int, work: Path, out: Path, check_lease: Callable[[], None]
) -> tuple[dict[Split, SplitRecord], Tally]:
    """Writes the shards of both splits below `out`. Ray must be initialised.

    Workers write into `work`, from where finished shards are moved: what a worker that was given up still writes never
    gets among them. The driver waits for the disk, so that no worker's core has to.

    Raises:
        OSError: the shards cannot be moved.
        StorageError: they cannot be written.
    """
    work.mkdir(exist_ok=True)
    (out / "shards").mkdir(parents=True, exist_ok=True)
    tally = Tally()
    records: dict[Split, dict[int, ShardRecord]] = {split: {} for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    todo = (shard for split in SPLITS for shard in _shards(selection, split, shard_tokens, work))
    with ThreadPoolExecutor(_SYNCING_THREADS) as pool, run_bounded(_write, todo) as results:
        syncing = []
        for result in results:
            check_lease()
            shutil.move(result.path, out / result.record.path)
            syncing.append(pool.submit(sync_file, out / result.record.path))
            tally.merge(result.tally)
            records[result.split][result.number] = result.record
            text_bytes[result.split] += result.text_bytes
        for synced in syncing:
            synced.result()
    splits = {
        split: SplitRecord.of([shards[number] for number in sorted(shards)], text_bytes[split])
        for split, shards in records.items()
    }
    return splits, tally


def _shards(selection: Selection, split: Split, shard_tokens: int, folder: Path) -> Iterator[_Shard]:
    """The shards of a split; the parts they lie in are let go as the shards are given."""
    parts: dict[int, SelectedPart] = {}

    def lengths() -> Iterator[Lengths]:
        for number, part in enumerate(selection.parts(split)):
            parts[number] = part
            yield part.lengths

    for number, runs in enumerate(cut_shards(lengths(), shard_tokens)):
        yield _Shard(split, number, folder, tuple(_documents(parts[run.part], run) for run in runs))
        for passed in [part for part in parts if part < runs[-1].part]:
            del parts[passed]


def _documents(part: SelectedPart, run: Run) -> _Documents:
    rows = None if part.rows is None else part.rows[run.begin : run.end]
    return _Documents(part.path, run.begin, run.end, rows)


def _write(shard: _Shard) -> _Written:
    name = shard_name(shard.split, shard.number)
    path = shard.folder / Path(name).name
    batch = pa.concat_batches([documents.read() for documents in shard.documents])
    tally = Tally()
    tally.add(batch)
    try:
        record = write_shard(path, name, batch)
    except OSError as error:
        raise StorageError(
            f"cannot write to {shard.folder}: {error.strerror or error}",
            next_step="free disk space or mend the permissions, then run the same command: committed spans are kept",
        ) from error
    text_bytes = int(np.sum(batch.column("size_bytes").to_numpy(), dtype=np.int64))
    return _Written(shard.split, shard.number, path, record, text_bytes, tally)
