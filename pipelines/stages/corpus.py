"""Stage `corpus`: documents to checksummed token shards, in Ray tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from actors.store.artifacts import Artifact, write_durably
from actors.text import CONTRACT
from configs.artifacts import TextContract
from configs.errors import ContractError, DataError
from configs.schema.corpus import CorpusConfig
from pipelines.corpus.clean import Rejected, decode
from pipelines.corpus.encode import Backend, Encoder, choose_backend
from pipelines.corpus.shards import BLOCK_BYTES, INDEX, SPLITS, CorpusIndex, write_split
from pipelines.corpus.sources import Listing, check_rejected, hash_fraction, list_source
from pipelines.corpus.spans import Commit, Span, committed_documents, encode_span, load_commit, plan_spans
from pipelines.corpus.tasks import run_bounded
from pipelines.stage import Progress, StageContext

_SAMPLE_BYTES = 100_000
"""Text of the source that both backends encode before the first task."""


class CorpusStage:
    """Encodes spans in parallel, commits each, and merges the committed parts into shards."""

    kind: ClassVar[str] = "corpus"
    artifact_kind: ClassVar[str | None] = "corpus"
    code_version: ClassVar[int] = 1

    def sources(self, config: CorpusConfig) -> Mapping[str, str]:
        """Digest of the source."""
        return {"source": list_source(config.source).digest}

    def run(self, config: CorpusConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Writes shards, index, report and quarantine. Ray must be initialised.

        Raises:
            ContractError: the tokenizer has no contract or cannot be opened.
            DataError: a split is empty, too many files are unusable, or a file changes meanwhile.
            StorageError: the parts cannot be written.
        """
        started = time.monotonic()
        listing = list_source(config.source)
        tokenizer = inputs["tokenizer"]
        contract = _read_contract(tokenizer.path)
        backend, reason = choose_backend(tokenizer.path, _sample(listing))
        commits = _encode(config, listing, tokenizer, backend, context)
        differing = [name for commit in commits for name in commit.differing]
        if differing:
            backend, reason = "tokenizers", f"gigatoken encoded {differing[0]} differently"
            commits = _encode(config, listing, tokenizer, backend, context)
        rejected = sorted(
            [*listing.unreadable, *(r for c in commits for r in c.rejected)], key=lambda r: (r.name, r.offset)
        )
        total = len(listing.files) + len(listing.unreadable)
        check_rejected(len(rejected), total, config.source, next(iter(rejected), None))

        context.check_lease()
        index = _merge(config, tokenizer.path, contract, _parts(context, backend), len(commits), context.out)
        _write_quarantine(context.out / "quarantine.jsonl", rejected)
        report = {
            "source_digest": listing.digest,
            "files": total,
            "quarantined": len(rejected),
            "empty": sum(c.empty for c in commits),
            "vocab_size": index.vocab_size,
            **{
                split: {
                    "documents": s.documents,
                    "tokens": s.tokens,
                    "text_bytes": s.text_bytes,
                    "bytes_per_token": round(s.text_bytes / s.tokens, 4),
                    "shards": len(s.shards),
                }
                for split, s in index.splits.items()
            },
        }
        (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        for split, s in index.splits.items():
            profile = {"documents": s.documents, "tokens": s.tokens, "text_bytes": s.text_bytes}
            context.run.log_dataset(
                name=f"{context.name}-{split}", digest=listing.digest, uri=config.source.path, context=split,
                profile=profile,
            )  # fmt: skip
        seconds = time.monotonic() - started
        speed = {"seconds": seconds, "megabytes_per_second": listing.size_bytes / 1e6 / seconds}
        return {**report, **speed, "encoder": backend, "encoder_reason": reason}


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


def _sample(listing: Listing) -> Iterator[str]:
    """The first documents in the order of a hash, until they make `_SAMPLE_BYTES`."""
    size = 0
    for file in sorted(listing.files, key=lambda f: (hash_fraction("probe", f.blake3), f.name)):
        if size >= _SAMPLE_BYTES:
            return
        text = decode(file.name, listing.read(file))
        if isinstance(text, str):
            size += file.size_bytes
            yield text


def _encode(
    config: CorpusConfig, listing: Listing, tokenizer: Artifact, backend: Backend, context: StageContext
) -> list[Commit]:
    """Encodes what is not committed yet; returns the commits in the order of the plan.

    Stops at the first span in which the backend and `tokenizers` differ, because none of its parts will be used.
    """
    parts = _parts(context, backend)
    parts.mkdir(parents=True, exist_ok=True)
    vocab_size = Encoder.load(tokenizer.path, backend).vocab_size
    first = Span(
        number=0, listing=listing, split=config.split, tokenizer=tokenizer.path, tokenizer_digest=tokenizer.digest,
        backend=backend, dtype=_dtype(vocab_size), parts=parts,
    )  # fmt: skip
    plan = plan_spans(listing.files, config.span_bytes)
    spans = [replace(first, number=n, listing=Listing(listing.root, files, ())) for n, files in enumerate(plan)]
    commits = {span.number: commit for span in spans if (commit := load_commit(span)) is not None}
    kept = sum(spans[n].listing.size_bytes for n in commits)
    started = time.monotonic()

    def advance() -> None:
        done = sum(spans[n].listing.size_bytes for n in commits)
        elapsed = max(time.monotonic() - started, 1e-3)
        tokens = sum(c.tokens for c in commits.values())
        figures = {"MB/s": (done - kept) / 1e6 / elapsed, "tokens": tokens}
        context.progress(Progress(done / 1e6, listing.size_bytes / 1e6, "MB", figures))

    advance()
    settled = any(commit.differing for commit in commits.values())
    todo = [] if settled else [span for span in spans if span.number not in commits]
    with closing(run_bounded(_encode_numbered, todo, in_flight=config.max_in_flight)) as results:
        for number, commit in results:
            context.check_lease()
            commits[number] = commit
            advance()
            if commit.differing:
                break
    return [commits[number] for number in sorted(commits)]


def _encode_numbered(span: Span) -> tuple[int, Commit]:
    return span.number, encode_span(span)


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _merge(
    config: CorpusConfig, tokenizer: Path, contract: TextContract, parts: Path, spans: int, out: Path
) -> CorpusIndex:
    """Writes the shards and the index from the committed parts."""
    encoder = Encoder.load(tokenizer, "tokenizers")
    splits = {}
    for split in SPLITS:
        record = write_split(out, split, committed_documents(parts, spans, split), config.shard_tokens)
        if not record.documents:
            raise DataError(
                f"no document of the source is in split {split}",
                received=f"split.validation_fraction {config.split.validation_fraction}",
                allowed="a source with text in both splits",
                next_step="take more files, another split.validation_fraction or another split.salt",
            )
        splits[split] = record
    index = CorpusIndex(
        dtype="uint16" if _dtype(encoder.vocab_size) == "uint16" else "uint32",
        vocab_size=encoder.vocab_size,
        end_of_text_id=encoder.end_of_text_id,
        contract=contract.hash,
        block_bytes=BLOCK_BYTES,
        splits=splits,
    )
    write_durably(out / INDEX, index.model_dump_json(indent=1).encode() + b"\n")
    return index


def _write_quarantine(path: Path, rejected: list[Rejected]) -> None:
    lines = [json.dumps({"path": r.name, "offset": r.offset, "reason": r.reason}) + "\n" for r in rejected]
    path.write_text("".join(lines))
