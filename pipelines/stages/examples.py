"""Stage `examples`: a dataset of labelled examples from files."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from actors.store.artifacts import Artifact
from configs.errors import DataError
from configs.schema.corpus import SourceConfig
from configs.schema.examples import ExamplesConfig
from pipelines.corpus.account import Account
from pipelines.corpus.examples import (
    LABELS,
    Example,
    Reading,
    distinct,
    label_names,
    read_labelled,
    read_parallel,
)
from pipelines.corpus.sources import Listing, is_validation, list_source
from pipelines.stage import Progress, StageContext

_TARGETS = {"source": "target", "heldout": "heldout_target"}
"""Sources of texts, and where their lines' counterparts are."""
_SHOWN = 20
"""Rejected records that the report names of each source."""


class ExamplesStage:
    """No text is both a training and a held-out example; the same text with the same label is in a split once."""

    kind: ClassVar[str] = "examples"
    artifact_kind: ClassVar[str | None] = "dataset"
    code_version: ClassVar[int] = 1

    def sources(self, config: ExamplesConfig) -> Mapping[str, str]:
        """Digests of the files, by their role in the config."""
        return {role: list_source(source).digest for role, source in _sources(config).items()}

    def run(self, config: ExamplesConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Writes train.jsonl, heldout.jsonl, labels.json and a report.

        Raises:
            DataError: a split has no example, too many records are unusable, or sides are not parallel.
        """
        started = time.monotonic()
        sources = _sources(config)
        listings = {role: list_source(source) for role, source in sources.items()}
        context.progress(Progress(0, len(listings), "files"))
        reports: dict[str, Any] = {}
        roles = [role for role in sources if role in _TARGETS]
        found = {role: _read(role, config, listings, reports) for role in roles}
        splits, left_out = _split(found, config)
        labels = label_names(splits["train"], config.task)
        unknown = set(label_names(splits["heldout"], config.task)) - set(labels)
        if unknown:
            raise DataError(
                "held-out examples have labels that no training example has",
                received=", ".join(sorted(unknown)),
                allowed=", ".join(labels),
                next_step="name the classes alike in both sources (labels), or split one source",
            )
        for split, examples in splits.items():
            lines = (json.dumps(example.record(), ensure_ascii=False) + "\n" for example in examples)
            (context.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        (context.out / LABELS).write_text(json.dumps({"task": config.task, "labels": labels}, indent=2) + "\n")
        counts = {split: len(examples) for split, examples in splits.items()}
        report: dict[str, Any] = {
            "task": config.task,
            "sources": reports,
            "examples": counts,
            "labels": {split: _counts(examples) for split, examples in splits.items()},
            "left_out": left_out,
        }
        (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        context.progress(Progress(len(listings), len(listings), "files"))
        context.run.log_dataset(
            name=context.name, digest=listings["source"].digest, uri=config.source.path, context="training",
            profile=counts,
        )  # fmt: skip
        rejected = sum(each["quarantined"] for each in reports.values())
        figures = {key: report[key] for key in ("task", "examples", "labels", "left_out")}
        return {**figures, "quarantined": rejected, "seconds": time.monotonic() - started}


def _sources(config: ExamplesConfig) -> dict[str, SourceConfig]:
    roles = ("source", "target", "heldout", "heldout_target")
    return {role: source for role in roles if (source := getattr(config, role)) is not None}


def _read(role: str, config: ExamplesConfig, listings: Mapping[str, Listing], reports: dict[str, Any]) -> list[Example]:
    """The examples of a source, and in `reports` what became of everything in it."""
    source, target = _sources(config)[role], _TARGETS[role]
    if target in listings:
        reading = read_parallel((listings[role], source), (listings[target], _sources(config)[target]))
    else:
        reading = read_labelled(listings[role], source, config.task, config.labels)
    reports[role] = _account(reading, listings[role], source)
    return reading.examples


def _account(reading: Reading, listing: Listing, source: SourceConfig) -> dict[str, Any]:
    account = Account()
    account.reject(listing.unreadable)
    account.add(reading.ledger)
    account.check(len(listing.files) + len(listing.unreadable), source)
    rejected = sorted([*listing.unreadable, *reading.ledger.rejected], key=lambda r: (r.name, r.offset))
    shown = [{"path": r.name, "offset": r.offset, "reason": r.reason} for r in rejected[:_SHOWN]]
    return {**account.summary(), "digest": listing.digest, "rejected": shown}


def _split(
    found: Mapping[str, Sequence[Example]], config: ExamplesConfig
) -> tuple[dict[str, list[Example]], dict[str, int]]:
    """The examples of both splits, and how many were left out for what reason."""
    everything = found["source"]
    if "heldout" in found:
        heldout = distinct(found["heldout"], set())
        texts = {example.digest for example in heldout}
        rest = [example for example in everything if example.digest not in texts]
        overlap = len(everything) - len(rest)
    else:
        heldout = distinct((e for e in everything if is_validation(e.digest, config.split)), set())
        rest = [e for e in everything if not is_validation(e.digest, config.split)]
        overlap = 0
    splits = {"train": distinct(rest, set()), "heldout": heldout}
    for name, examples in splits.items():
        if not examples:
            raise DataError(
                f"{name}.jsonl would hold no example",
                received=config.source.path,
                allowed="a source with examples in both splits",
                next_step="take more source, or change split.validation_fraction",
            )
    total = sum(map(len, found.values()))
    return splits, {"also_held_out": overlap, "repeated": total - overlap - sum(map(len, splits.values()))}


def _counts(examples: Sequence[Example]) -> dict[str, int]:
    """Examples of each class, or words of each tag; nothing where texts are written."""
    counts: Counter[str] = Counter()
    for example in examples:
        counts.update(example.fields.get("tags", ()))
        counts.update([example.fields["label"]] if "label" in example.fields else ())
    return dict(sorted(counts.items()))
