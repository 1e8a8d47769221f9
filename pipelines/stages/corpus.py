"""Stage `corpus`: documents to checksummed token shards, in Ray tasks."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from actors.store.artifacts import Artifact, write_durably
from actors.text import CONTRACT
from configs.artifacts import TextContract
from configs.errors import ContractError, DataError
from configs.schema.corpus import CorpusConfig
from pipelines.corpus.account import Account
from pipelines.corpus.contamination import Registered, evaluation_sets, register, set_digest, settle
from pipelines.corpus.documents import sample_texts
from pipelines.corpus.encode import PROBES, Backend, Encoder, fastest_encoder, first_difference
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.merge import merge_parts
from pipelines.corpus.pieces import choose_span_bytes, plan_spans
from pipelines.corpus.report import metrics, render, split_figures
from pipelines.corpus.selection import Selection
from pipelines.corpus.shards import BLOCK_BYTES, INDEX, CheckedSet, CorpusIndex, Split, SplitRecord
from pipelines.corpus.sources import Listing, Rejected, check_unchanged, list_source
from pipelines.corpus.spans import Commit, Span, encode_span, load_commit, read_commit
from pipelines.corpus.tasks import run_bounded
from pipelines.stage import Progress, StageContext

_SAMPLE_BYTES = 100_000
"""Text of the source that both backends encode while the first tasks run."""


class CorpusStage:
    """Encodes spans in parallel, commits each, and merges the committed parts into shards."""

    kind: ClassVar[str] = "corpus"
    artifact_kind: ClassVar[str | None] = "corpus"
    code_version: ClassVar[int] = 3

    def sources(self, config: CorpusConfig) -> Mapping[str, str]:
        """Digests of the source and of the evaluation sets in files."""
        sets = {f"contamination.{name}": set_digest(one) for name, one in config.contamination.sets.items()}
        return {"source": list_source(config.source).digest, **sets}

    def run(self, config: CorpusConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Writes shards, index, report and quarantine. Ray must be initialised.

        Raises:
            ContractError: the tokenizer has no contract or cannot be opened.
            DataError: a split is empty, too many files are unusable, or a file changes meanwhile.
            StorageError: the parts cannot be written.
        """
        steps = _Steps()
        listing = list_source(config.source)
        steps.end("list")
        tokenizer = inputs["tokenizer"]
        contract = _read_contract(tokenizer.path)
        encoder, reason = fastest_encoder(tokenizer.path)
        sets = evaluation_sets(config, inputs)
        evaluation = register(sets, config.contamination, context.work / "evaluation.arrow") if sets else None
        encoded = _encode(config, listing, tokenizer, encoder, evaluation, context)
        if encoded.differing is not None:
            reason = f"{encoder.backend} encoded {encoded.differing} differently"
            encoder = Encoder.load(tokenizer.path, "tokenizers")
            encoded = _encode(config, listing, tokenizer, encoder, evaluation, context)
        steps.end("encode")
        check_unchanged(listing, config.source)
        if encoder.backend != "tokenizers":
            reason = f"ids equal to those of tokenizers on {encoded.compared} texts"
        parts = _parts(context, encoder.backend)
        account = _account(listing, parts, encoded.spans, context.out / "quarantine.jsonl")
        files = len(listing.files) + len(listing.unreadable)
        account.check(files, config.source)
        checked = settle(evaluation, account, config.contamination)
        selection = Selection.make(parts, encoded.spans, config.dedup)
        account.leave_out(selection.dropped)
        steps.end("select")

        context.check_lease()
        splits, tally = merge_parts(
            selection, config.shard_tokens, context.work / "shards", context.out, context.check_lease
        )
        _check_filled(splits, config)
        index = _index(encoder, contract, splits, checked)
        report = {
            "source_digest": listing.digest,
            "files": files,
            **account.summary(),
            **tally.figures(account.by_source),
            "duplicates": selection.figures(),
            "contamination": {name: one.model_dump() for name, one in checked.items()},
            "vocab_size": index.vocab_size,
            **split_figures(index.splits),
        }
        _publish(report, config, index, context)
        steps.end("merge")
        speed = steps.speed(listing.size_bytes)
        context.run.log_metrics(_speed_metrics(speed), step=0)
        return {**report, **speed, "spans": encoded.spans, "encoder": encoder.backend, "encoder_reason": reason}


class _Steps:
    """How long each step took, one after the other."""

    def __init__(self) -> None:
        self._began = self._ended = time.monotonic()
        self._seconds: dict[str, float] = {}

    def end(self, step: str) -> None:
        """What was done since the last step ended was this one."""
        now = time.monotonic()
        self._seconds[step], self._ended = now - self._ended, now

    def speed(self, size_bytes: int) -> dict[str, Any]:
        """Seconds in all and by step, and the source's megabytes a second."""
        seconds = self._ended - self._began
        return {
            "seconds": seconds,
            "seconds_by_step": {step: round(taken, 3) for step, taken in self._seconds.items()},
            "megabytes_per_second": size_bytes / 1e6 / seconds,
        }


def _speed_metrics(speed: Mapping[str, Any]) -> dict[str, float]:
    whole = {f"corpus/{name}": float(speed[name]) for name in ("seconds", "megabytes_per_second")}
    return whole | {f"corpus/seconds/{step}": float(taken) for step, taken in speed["seconds_by_step"].items()}


def _publish(report: Mapping[str, Any], config: CorpusConfig, index: CorpusIndex, context: StageContext) -> None:
    """Writes index and report, and tells the tracker what is in them."""
    write_durably(context.out / INDEX, index.model_dump_json(indent=1).encode() + b"\n")
    (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    (context.out / "report.html").write_text(render(report), encoding="utf-8")
    context.run.log_file(context.out / "report.html")
    context.run.log_metrics(metrics(report), step=0)
    for split, s in index.splits.items():
        context.run.log_dataset(
            name=f"{context.name}-{split}", digest=report["source_digest"], uri=config.source.path, context=split,
            profile={"documents": s.documents, "tokens": s.tokens, "text_bytes": s.text_bytes},
        )  # fmt: skip


def _parts(context: StageContext, backend: Backend) -> Path:
    return context.work / f"parts-{backend}"


def _read_contract(tokenizer: Path) -> TextContract:
    path = tokenizer / CONTRACT
    try:
        return TextContract.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise ContractError(
            f"{path} is not a text contract",
            received=str(error),
            allowed="a tokenizer artifact with its contract",
            next_step="make the tokenizer with the stage `tokenizer`",
        ) from error


@dataclass(frozen=True)
class _Encoded:
    """What encoding ended with."""

    spans: int
    compared: int
    """Texts that both the backend and `tokenizers` encoded."""
    differing: str | None
    """One of them that the backend and `tokenizers` encoded differently: nothing that was encoded may be used."""


@dataclass(frozen=True)
class _Done:
    """What the driver keeps of a span that is committed."""

    size_bytes: int
    tokens: int
    checked: int
    differing: tuple[str, ...]


def _encode(
    config: CorpusConfig,
    listing: Listing,
    tokenizer: Artifact,
    encoder: Encoder,
    evaluation: Registered | None,
    context: StageContext,
) -> _Encoded:
    """Encodes what is not committed yet.

    Stops where the backend and `tokenizers` first differ, because none of the parts will be used then. They are
    compared on a sample here while the first tasks run.
    """
    parts = _parts(context, encoder.backend)
    parts.mkdir(parents=True, exist_ok=True)
    first = Span(
        number=0, listing=replace(listing, files=(), unreadable=()), pieces=(), source=config.source,
        split=config.split, tokenizer=tokenizer.path, tokenizer_digest=tokenizer.digest, backend=encoder.backend,
        dtype=_dtype(encoder.vocab_size), parts=parts, dedup=config.dedup, evaluation=evaluation,
    )  # fmt: skip
    plan = plan_spans(listing, config.source, config.span_bytes or choose_span_bytes(listing.size_bytes))
    spans = [replace(first, number=n, pieces=pieces) for n, pieces in enumerate(plan)]
    done = {span.number: _done(span, commit) for span in spans if (commit := load_commit(span)) is not None}
    kept = sum(d.size_bytes for d in done.values())
    total, tokens, compared = kept, sum(d.tokens for d in done.values()), sum(d.checked for d in done.values())
    started = time.monotonic()

    def advance() -> None:
        elapsed = max(time.monotonic() - started, 1e-3)
        figures = {"MB/s": (total - kept) / 1e6 / elapsed, "tokens": tokens}
        context.progress(Progress(total / 1e6, listing.size_bytes / 1e6, "MB", figures))

    advance()
    differing = next((name for n in sorted(done) for name in done[n].differing), None)
    todo = [span for span in spans if span.number not in done] if differing is None else []
    with run_bounded(_encode_one, todo, in_flight=config.max_in_flight) as results:
        if differing is None and encoder.backend != "tokenizers":
            sample = [text.decode() for text in sample_texts(listing, config.source, "probe", _SAMPLE_BYTES, Ledger())]
            compared += len(PROBES) + len(sample)
            differing = first_difference(encoder, sample)
        for result in results if differing is None else ():
            context.check_lease()
            total, tokens = total + result.size_bytes, tokens + result.tokens
            compared += result.checked
            advance()
            if result.differing:
                differing = result.differing[0]
                break
    return _Encoded(len(spans), compared, differing)


def _encode_one(span: Span) -> _Done:
    return _done(span, encode_span(span))


def _done(span: Span, commit: Commit) -> _Done:
    return _Done(span.size_bytes, commit.tokens, commit.checked, commit.differing)


def _account(listing: Listing, parts: Path, spans: int, quarantine: Path) -> Account:
    """Sums the commit records, and writes what is unusable, by file and place."""
    account = Account()
    account.reject(listing.unreadable)

    def rejected() -> Iterator[Rejected]:
        for number in range(spans):
            ledger = read_commit(parts, number).ledger
            account.add(ledger)
            yield from sorted(ledger.rejected, key=_place)

    with quarantine.open("w", encoding="utf-8") as lines:
        for r in heapq.merge(sorted(listing.unreadable, key=_place), rejected(), key=_place):
            lines.write(json.dumps({"path": r.name, "offset": r.offset, "reason": r.reason}) + "\n")
    return account


def _place(rejected: Rejected) -> tuple[str, int]:
    return rejected.name, rejected.offset


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _check_filled(splits: Mapping[Split, SplitRecord], config: CorpusConfig) -> None:
    for split, record in splits.items():
        if not record.documents:
            raise DataError(
                f"no document of the source is in split {split}",
                received=f"split.validation_fraction {config.split.validation_fraction}",
                allowed="a source with text in both splits",
                next_step="take more files, another split.validation_fraction or another split.salt",
            )


def _index(
    encoder: Encoder, contract: TextContract, splits: Mapping[Split, SplitRecord], checked: Mapping[str, CheckedSet]
) -> CorpusIndex:
    return CorpusIndex(
        dtype="uint16" if _dtype(encoder.vocab_size) == "uint16" else "uint32",
        vocab_size=encoder.vocab_size,
        end_of_text_id=encoder.end_of_text_id,
        contract=contract.hash,
        block_bytes=BLOCK_BYTES,
        splits=dict(splits),
        checked=dict(checked),
    )
