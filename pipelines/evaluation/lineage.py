"""What a model was made from, and what it may therefore not be scored on.

A corpus artifact records, for every evaluation set it was checked against, how many training documents hold passages of
it (`pipelines.corpus.contamination`). A model is scored on a set only if none of the corpora in its lineage is known to
hold some. A corpus that was never checked against the set is no reason to refuse, but it is named.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import blake3
import pyarrow as pa
import pyarrow.compute as pc

from actors.store.artifacts import Artifact, ArtifactStore
from configs.artifacts import Manifest, Ref
from configs.errors import ArtifactError, DataError
from pipelines.corpus.contamination import HELD_OUT, held_out_pairs, set_digest
from pipelines.corpus.reading import ShardFolder, TokenStream
from pipelines.corpus.shards import CorpusIndex
from pipelines.evaluation.items import Item, longest_text

_REPEATED = 0.01

Known = Literal["clean", "not checked", "removed"]
"""What is known of a corpus and a set: checked and without overlap; nothing; the corpus is no longer in the store."""


def ancestors(manifests: Sequence[Manifest], store: ArtifactStore) -> Iterator[tuple[str, str, Manifest | None]]:
    """Reference, digest and manifest of `manifests` and of all they were made from; no manifest of what was removed."""
    seen: set[str] = set()
    pending = list(manifests)
    while pending:
        manifest = pending.pop()
        if manifest.digest in seen:
            continue
        seen.add(manifest.digest)
        yield str(manifest.ref), manifest.digest, manifest
        for record in manifest.inputs.values():
            try:
                found = store.get(record.ref, verify=False).manifest
            except ArtifactError:  # what was made from it still says which it was
                yield record.ref, record.digest, None
            else:
                pending.append(found)


def check_overlaps(models: Mapping[str, Artifact], data: Artifact, store: ArtifactStore) -> dict[str, dict[str, Known]]:
    """What is known, by model and corpus in its lineage, of overlaps with the held-out pairs of `data`.

    Raises:
        DataError: a model learned from a corpus that holds some.
    """
    wanted = set_digest(held_out_pairs(data.path / HELD_OUT))
    found: dict[str, dict[str, Known]] = {}
    for label, model in models.items():
        found[label] = {}
        for ref, _, manifest in ancestors([model.manifest], store):
            if Ref.parse(ref).kind == "corpus":
                gone = manifest is None
                found[label][ref] = (
                    "removed" if gone else _check(f"models.{label}", store.get(ref, verify=False), data, wanted)
                )
    return found


def _check(model: str, corpus: Artifact, data: Artifact, wanted: str) -> Known:
    checked = {name: one for name, one in CorpusIndex.load(corpus.path).checked.items() if one.digest == wanted}
    for name, one in checked.items():
        if one.kept:
            raise DataError(
                f"{model} may not be scored on {data.ref}: it learned from {corpus.ref}, in which {one.kept} documents "
                f"hold passages of the evaluation set {name}",
                received=f"{one.kept} overlapping documents kept, {one.dropped} dropped",
                allowed="a model whose corpora hold no overlap with what it is scored on",
                next_step="set contamination.action of the corpus to drop and train again, or score it on other data",
            )
    return "clean" if checked else "not checked"


def check_items(label: str, model: Artifact, store: ArtifactStore, task: str, items: Sequence[Item]) -> dict[str, str]:
    """What is known, by dataset and corpus in a model's lineage, of the task's items among what was trained on.

    An item counts as learned if its longest text is a text of a training example, case and blanks aside, or a whole
    document of a corpus's training split; of passages in longer documents the corpus's own gate knows. Up to one item
    in a hundred may be: sets repeat themselves; such items are named in the report.

    Raises:
        DataError: the model learned from the set.
    """
    found: dict[str, str] = {}
    texts = [longest_text(item) for item in items]
    for ref, _, manifest in ancestors([model.manifest], store):
        kind = Ref.parse(ref).kind
        if kind not in _LEARNED_FROM:
            continue
        if manifest is None:
            found[ref] = "removed"
            continue
        known = _LEARNED_FROM[kind](store.get(ref, verify=False).path, texts)
        if known > len(items) * _REPEATED:
            raise DataError(
                f"models.{label} may not be scored on {task}: it learned from {ref}, which holds its items",
                received=f"{known} of {len(items)} items were trained on",
                allowed="a task whose items the model has not learned from",
                next_step="score it on other data, or train it without them",
            )
        found[ref] = "clean" if not known else f"{known} of {len(items)} items were trained on"
    return found


def _in_dataset(dataset: Path, texts: Sequence[str]) -> int:
    """How many of the texts are those of training examples."""
    path = dataset / "train.jsonl"
    if not path.is_file():
        return 0
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    learned = {" ".join(record["words"]) if "words" in record else "" for record in records}
    learned |= {str(value) for record in records for key, value in record.items() if key in ("text", "prompt")}
    normal = {_normal(text) for text in learned} - {""}
    return sum(_normal(text) in normal for text in texts)


def _in_corpus(corpus: Path, texts: Sequence[str]) -> int:
    """How many of the texts are documents of the training split, by the hashes that stand in its shards."""
    index = CorpusIndex.load(corpus)
    record = index.splits["train"]
    stream = TokenStream(ShardFolder(corpus), record, index.block_bytes)
    digests = [blake3.blake3(unicodedata.normalize("NFC", text).encode()).hexdigest() for text in texts]
    wanted = pa.array(sorted(set(digests)))
    learned: set[str] = set()
    for number in range(len(record.shards)):
        column = stream.reader(number).column("blake3")
        learned.update(column.filter(pc.is_in(column, value_set=wanted)).to_pylist())
    return sum(digest in learned for digest in digests)


_LEARNED_FROM: Mapping[str, Callable[[Path, Sequence[str]], int]] = {"dataset": _in_dataset, "corpus": _in_corpus}


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
