"""`ganymede corpus`: what a token corpus holds, what a model saw of it, and the same for other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.artifacts import Reference, artifact_root
from infra.cli.output import Debug, Json, print_json, print_table, say, size
from infra.local import state_home

if TYPE_CHECKING:
    from actors.store.artifacts import Artifact
    from pipelines.corpus.inspect import InspectedDocument, Inspector
    from pipelines.corpus.loader import Sample

app = typer.Typer(
    help="What a token corpus holds and a model saw of it; export to other formats.", no_args_is_help=True
)

_SHOWN_CHARACTERS = 600
_SHOWN_TOKENS = 60


@app.command()
def inspect(
    ref: Reference,
    doc: Annotated[
        str | None,
        typer.Option(metavar="ID", help="One document: split/number, its name in the source, or its blake3."),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Show this many documents of each split.")] = 1,
    row_tokens: Annotated[
        int | None, typer.Option(min=1, help="Show what each packing would do to the documents at this row length.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows documents as they were, as tokens, and where they came from.

    Example: ganymede corpus inspect corpus/demo@1 --sample 3
    """
    from pipelines.corpus.inspect import Inspector

    corpus, tokenizer = _open(ref)
    inspector = Inspector.open(corpus.path, tokenizer.path)
    splits = inspector.index.splits
    documents = [inspector.find(doc)] if doc else [d for s in splits for d in inspector.sample(s, sample)]
    packing = _packing(inspector, row_tokens) if row_tokens else []
    if as_json:
        print_json(_as_json(corpus, inspector, packing, documents))
        return
    if not doc:
        print_table(
            ("split", "# documents", "# tokens", "# text", "# bytes per token", "# shards"),
            [
                (name, f"{s.documents:,}", f"{s.tokens:,}", size(s.text_bytes), f"{s.text_bytes / s.tokens:.3f}",
                 f"{len(s.shards):,}")
                for name, s in splits.items()
            ],
        )  # fmt: skip
    if packing:
        typer.echo()
        columns = ("split", "packing", "# rows", "# filled", "# documents cut", "# tokens dropped")
        print_table(columns, [tuple(row.values()) for row in packing], title=f"rows of {row_tokens} tokens")
    for document in documents:
        _show(document, whole=doc is not None)


@app.command()
def export(
    ref: Reference,
    prefix: Annotated[Path, typer.Argument(help="Files PREFIX.bin and PREFIX.idx are written.")],
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Writes a split in Megatron-LM's format. Example: ganymede corpus export corpus/demo@1 data/demo."""
    from pipelines.corpus.export import export_megatron

    corpus, _ = _open(ref)
    written = export_megatron(corpus.path, split, prefix)
    if as_json:
        print_json(vars(written))
        return
    typer.echo(written.tokens)
    typer.echo(written.index)
    say(f"{written.documents:,} documents, {written.token_count:,} tokens")


@app.command()
def ledger(
    ref: Reference,
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, as in the metrics.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows which documents a pretrained model learned from in a step, whatever the number of workers was.

    Example: ganymede corpus ledger model/demo-pretrain@1 --step 120
    """
    samples = _ledger(ref, step)
    if as_json:
        print_json([sample._asdict() for sample in samples])
        return
    print_table(
        ("# row of the batch", "corpus", "# epoch", "# row of the corpus", "documents"),
        [
            (str(i), s.source or "-", str(s.epoch), f"{s.row:,}", " ".join(f"train/{d}" for d in s.documents))
            for i, s in enumerate(samples)
        ],
    )


def _ledger(ref: str, step: int) -> list[Sample]:
    from actors.store.artifacts import ArtifactStore
    from configs.errors import ArtifactError, CorruptArtifactError, InputError
    from configs.schema.training import PretrainConfig
    from pipelines.stages.pretrain import PretrainStage, corpora_of, open_split
    from pipelines.training.models import context_length

    store = ArtifactStore(artifact_root(state_home()))
    model = store.get(ref, verify=False)
    manifest = model.manifest
    if manifest.config.get("kind") != "pretrain":
        raise ArtifactError(
            f"{ref} was not pretrained on a corpus", received=manifest.config.get("kind", manifest.kind),
            allowed="a model of a pretrain stage", next_step="ganymede artifacts list",
        )  # fmt: skip
    if manifest.code_version != PretrainStage.code_version:
        raise ArtifactError(
            f"{ref} was made by a version of the stage that ordered rows in another way",
            received=manifest.code_version, allowed=f"code version {PretrainStage.code_version}",
            next_step="use the version of Ganymede that its manifest names, or train it again",
        )  # fmt: skip
    config = PretrainConfig.model_validate(manifest.config)
    if step > config.training.steps:
        raise InputError(f"{ref} was not trained so long", received=step, allowed=f"1 to {config.training.steps}")
    folders = {}
    for name, record in corpora_of(manifest.inputs).items():
        corpus = store.get(record.ref, verify=False)
        if corpus.digest != record.digest:
            raise CorruptArtifactError(
                f"{ref} was trained on another {record.ref} than the one in the store",
                received=corpus.digest, allowed=record.digest, next_step="run the recipe again",
            )  # fmt: skip
        folders[name] = corpus.path
    row_tokens = config.model.context_length if config.model.start is None else context_length(model.path)
    return open_split("train", corpora=folders, config=config, row_tokens=row_tokens).provenance(step - 1)


def _open(ref: str) -> tuple[Artifact, Artifact]:
    """The corpus, and the tokenizer it was made with; blocks of the corpus are verified as they are read."""
    from actors.store.artifacts import ArtifactStore
    from configs.errors import ArtifactError, CorruptArtifactError

    store = ArtifactStore(artifact_root(state_home()))
    corpus = store.get(ref, verify=False)
    record = corpus.manifest.inputs.get("tokenizer")
    if corpus.manifest.kind != "corpus" or record is None:
        raise ArtifactError(
            f"{ref} is not a corpus", received=corpus.manifest.kind, allowed="an artifact of the corpus stage",
            next_step="ganymede artifacts list",
        )  # fmt: skip
    tokenizer = store.get(record.ref)
    if tokenizer.digest != record.digest:
        raise CorruptArtifactError(
            f"{ref} was made with another {record.ref} than the one in the store",
            received=tokenizer.digest, allowed=record.digest, next_step="run the recipe's corpus stage again",
        )  # fmt: skip
    return corpus, tokenizer


def _packing(inspector: Inspector, row_tokens: int) -> list[dict[str, str]]:
    return [
        {
            "split": split,
            "packing": layout,
            "rows": f"{report.rows:,}",
            "filled": f"{report.utilisation:.2%}",
            "documents_cut": f"{report.truncation:.2%}",
            "tokens_dropped": f"{report.dropped:,}",
        }
        for split in inspector.index.splits
        for layout, report in inspector.packing(split, row_tokens).items()
    ]


def _as_json(
    corpus: Artifact, inspector: Inspector, packing: list[dict[str, str]], documents: list[InspectedDocument]
) -> dict[str, Any]:
    return {
        "artifact": str(corpus.ref),
        "digest": corpus.digest,
        "splits": {name: s.model_dump(exclude={"shards"}) for name, s in inspector.index.splits.items()},
        "packing": packing,
        "documents": [{**vars(d), "tokens": [vars(t) for t in d.tokens]} for d in documents],
    }


def _show(document: InspectedDocument, *, whole: bool) -> None:
    """The document; if not `whole`, the beginning of it."""
    typer.echo(f"\n{document.id}  ({document.shard}, row {document.row})")
    for name, value in document.origin.items():
        typer.echo(f"  {name}: {value}")
    text = document.text if whole else document.text[:_SHOWN_CHARACTERS]
    tokens = document.tokens if whole else document.tokens[:_SHOWN_TOKENS]
    left = len(document.text) - len(text)
    typer.echo(f"  text ({len(document.text):,} characters):")
    typer.echo("".join(f"    {line}\n" for line in text.splitlines()).rstrip("\n"))
    if left:
        typer.echo(f"    ... {left:,} more characters")
    typer.echo(f"  tokens ({len(document.tokens):,}):")
    typer.echo("    " + " ".join(f"{token.piece}:{token.id}" for token in tokens))
    if len(tokens) < len(document.tokens):
        typer.echo(f"    ... {len(document.tokens) - len(tokens):,} more tokens")
