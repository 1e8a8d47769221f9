"""Stage `instructions`: pairs for supervised fine-tuning, derived from Python source in Ray tasks."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from actors.store.artifacts import Artifact
from configs.errors import DataError
from configs.schema.corpus import InstructionsConfig
from pipelines.corpus.account import Account
from pipelines.corpus.documents import read_documents
from pipelines.corpus.instructions import Pair, Task, deduplicate, parse_pairs
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.pieces import Piece, plan_spans
from pipelines.corpus.sources import Listing, Rejected, is_validation, list_source
from pipelines.corpus.tasks import run_bounded
from pipelines.stage import Progress, StageContext

_SPAN_BYTES = 1 << 20
"""Source that one task parses; results are sorted, so it decides nothing but the number of tasks."""


@dataclass(frozen=True)
class _Parsed:
    """What one task found."""

    size_bytes: int
    train: list[Pair]
    heldout: list[Pair]
    ledger: Ledger
    unparsable: list[str]


class InstructionsStage:
    """Held-out pairs come from files of the validation split alone; no held-out prompt is also a training prompt."""

    kind: ClassVar[str] = "instructions"
    artifact_kind: ClassVar[str | None] = "dataset"
    code_version: ClassVar[int] = 2

    def sources(self, config: InstructionsConfig) -> Mapping[str, str]:
        """Digest of the source."""
        return {"source": list_source(config.source).digest}

    def run(self, config: InstructionsConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Writes train.jsonl, heldout.jsonl and a report. Ray must be initialised.

        Raises:
            DataError: a task has no pair in one of the files, or too many source files are unusable.
        """
        started = time.monotonic()
        listing = list_source(config.source)
        found = _parse_all(config, listing, context)
        unusable = [*listing.unreadable, *(r for p in found for r in p.ledger.rejected)]
        total = len(listing.files) + len(listing.unreadable)
        account = Account()
        account.reject(listing.unreadable)
        for parsed in found:
            account.add(parsed.ledger)
        account.check(total, config.source)

        seen: set[Any] = set()
        pairs = {
            "train": deduplicate((pair for p in found for pair in p.train), seen),
            "heldout": deduplicate((pair for p in found for pair in p.heldout), seen),
        }
        counts = {name: Counter(pair.task for pair in group) for name, group in pairs.items()}
        for name, group in pairs.items():
            _refuse_empty(name, counts[name], config)
            _write(context.out / f"{name}.jsonl", group)
        report = {
            "source_digest": listing.digest,
            "files": total,
            "not_text": [
                {"path": r.name, "offset": r.offset, "reason": r.reason} for r in sorted(unusable, key=_place)
            ],
            "not_python": sorted(name for p in found for name in p.unparsable),
            "pairs": {name: dict(sorted(c.items())) for name, c in counts.items()},
            "duplicates": sum(len(p.train) + len(p.heldout) for p in found) - sum(map(len, pairs.values())),
            "mean_prompt_chars": _mean([len(p.prompt) for p in pairs["train"]]),
            "mean_completion_chars": _mean([len(p.completion) for p in pairs["train"]]),
        }
        (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        context.run.log_dataset(
            name=context.name, digest=listing.digest, uri=config.source.path, context="training",
            profile={name: len(group) for name, group in pairs.items()},
        )  # fmt: skip
        figures = {key: report[key] for key in ("files", "pairs", "duplicates", "mean_prompt_chars")}
        return {**figures, "seconds": time.monotonic() - started}


def _parse_all(config: InstructionsConfig, listing: Listing, context: StageContext) -> list[_Parsed]:
    place = replace(listing, files=(), unreadable=())
    spans = [(place, pieces, config) for pieces in plan_spans(listing, config.source, _SPAN_BYTES)]
    found: list[_Parsed] = []
    done = 0
    context.progress(Progress(0, listing.size_bytes / 1e6, "MB"))
    with run_bounded(_parse_span, spans) as results:
        for parsed in results:
            context.check_lease()
            found.append(parsed)
            done += parsed.size_bytes
            pairs = sum(len(p.train) + len(p.heldout) for p in found)
            context.progress(Progress(done / 1e6, listing.size_bytes / 1e6, "MB", {"pairs": pairs}))
    return found


def _place(rejected: Rejected) -> tuple[str, int]:
    return rejected.name, rejected.offset


def _parse_span(argument: tuple[Listing, tuple[Piece, ...], InstructionsConfig]) -> _Parsed:
    listing, pieces, config = argument
    result = _Parsed(sum(p.size_bytes for p in pieces), [], [], Ledger(), [])
    for documents in read_documents(listing, pieces, config.source, result.ledger):
        for name, digest, text in zip(documents.names, documents.digests, documents.texts, strict=True):
            pairs = parse_pairs(name, text.decode(), config)
            if isinstance(pairs, str):
                result.unparsable.append(name)
            else:
                (result.heldout if is_validation(digest, config.split) else result.train).extend(pairs)
    return result


def _refuse_empty(name: str, counts: Mapping[Task, int], config: InstructionsConfig) -> None:
    missing = [task for task in config.tasks if not counts.get(task)]
    if missing:
        raise DataError(
            f"{name}.jsonl would hold no pair for {', '.join(missing)}",
            received=config.source.path,
            allowed="Python source with documented functions in both splits",
            next_step="take more source, or raise max_prompt_chars, max_completion_chars or split.validation_fraction",
        )


def _mean(values: list[int]) -> float:
    return round(sum(values) / len(values), 1)


def _write(path: Path, pairs: list[Pair]) -> None:
    path.write_text("".join(pair.model_dump_json() + "\n" for pair in pairs), encoding="utf-8")
