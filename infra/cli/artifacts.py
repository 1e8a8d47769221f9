"""`ganymede artifacts`: what the store holds, whether it is whole, and what may go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.output import Debug, Json, print_json, print_table, say, size, wants
from infra.local import state_home

if TYPE_CHECKING:
    from configs.artifacts import Manifest, Ref

app = typer.Typer(help="What the stages made: list, show, verify, remove.", no_args_is_help=True)
Reference = Annotated[str, typer.Argument(metavar="KIND/NAME@VERSION", help="As in model/demo-finetune@1.")]


def artifact_root(home: Path) -> Path:
    """Where the artifacts of a state folder are."""
    return home / "artifacts"


@app.command("list")
def list_(as_json: Json = False, debug: Debug = False) -> None:
    """Lists every artifact. Example: ganymede artifacts list."""
    from actors.store.artifacts import ArtifactStore

    manifests = ArtifactStore(artifact_root(state_home())).list()
    if as_json:
        print_json([{"ref": str(m.ref), **m.model_dump(exclude={"config", "literals", "files"})} for m in manifests])
        return
    rows = [(str(m.ref), size(_bytes(m)), m.digest[:12], m.created_at) for m in manifests]
    print_table(("artifact", "# size", "digest", "made at (UTC)"), rows)
    if not rows:
        say("the store is empty; ganymede run demo fills it")


@app.command()
def show(ref: Reference, as_json: Json = False, debug: Debug = False) -> None:
    """Shows how an artifact was made. Example: ganymede artifacts show model/demo-finetune@1."""
    from actors.store.artifacts import ArtifactStore

    artifact = ArtifactStore(artifact_root(state_home())).get(ref, verify=False)
    manifest = artifact.manifest
    if as_json:
        print_json({"path": str(artifact.path), **manifest.model_dump()})
        return
    import yaml

    facts = manifest.model_dump(include={"digest", "fingerprint", "created_at", "tracking_run", "config", "summary"})
    facts["inputs"] = {role: record.ref for role, record in manifest.inputs.items()}
    facts = {"artifact": str(manifest.ref), "path": str(artifact.path), **facts, "packages": manifest.packages}
    typer.echo(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).rstrip())
    print_table(("file", "# size", "blake3"), [(f.path, size(f.size_bytes), f.blake3[:12]) for f in manifest.files])


@app.command()
def verify(
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND/NAME@VERSION]...", help="All of them if left out.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compares every file with its manifest; exit code 1 if one differs. Example: ganymede artifacts verify."""
    from actors.store.artifacts import ArtifactStore
    from configs.artifacts import Ref
    from configs.errors import CorruptArtifactError

    store = ArtifactStore(artifact_root(state_home()))
    results = []
    for ref in [Ref.parse(text) for text in refs] if refs else _published(store.root):
        try:
            store.get(ref)
            results.append({"ref": str(ref), "whole": True, "problem": None, "next": None})
        except CorruptArtifactError as error:
            results.append({"ref": str(ref), "whole": False, "problem": error.what, "next": error.next_step})
    damaged = [r for r in results if not r["whole"]]
    if as_json:
        print_json(results)
    else:
        print_table(("artifact", "state"), [(str(r["ref"]), str(r["problem"] or "whole")) for r in results])
        for result in damaged:
            say(f"next: {result['next']}")
    if damaged:
        raise typer.Exit(1)


@app.command()
def gc(
    context: typer.Context,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Keep this many newest versions of each artifact and what they need.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="KIND/NAME@VERSION", help="Remove this artifact; can be repeated.")
    ] = None,
    interrupted: Annotated[
        bool, typer.Option("--interrupted", help="Remove the work of interrupted runs too: they start from scratch.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Frees disk: what killed attempts left, and what the options name. Refused while a run is going on.

    Example: ganymede artifacts gc --keep 1 --dry-run
    """
    from actors.store import lease
    from actors.store.artifacts import ArtifactStore, remove_tree
    from configs.artifacts import Ref

    home = state_home()
    store = ArtifactStore(artifact_root(home))
    with ExitStack() as held:
        for folder in sorted((home / "leases").glob("*")):
            held.enter_context(lease.hold(folder))
        doomed = {Ref.parse(text) for text in remove or ()}
        if keep is not None:
            doomed |= superseded(store.list(), keep)
        folders = [*_leftovers(store.root), *(sorted((home / "work").glob("*")) if interrupted else ())]
        freed = sum(_folder_bytes(f) for f in [*folders, *(store.path(ref) for ref in doomed)])
        gone = [*map(str, sorted(doomed)), *(str(f.relative_to(home)) for f in folders)]
        if not dry_run:
            for ref in doomed:
                store.remove(ref)
            for folder in folders:
                remove_tree(folder)
    if wants(context, "as_json"):
        print_json({"removed": gone, "bytes": freed, "dry_run": dry_run})
        return
    for line in gone:
        typer.echo(line)
    say(f"{size(freed)} {'would be' if dry_run else 'are'} free again")


def superseded(manifests: Sequence[Manifest], keep: int) -> set[Ref]:
    """The artifacts that are neither among the `keep` newest versions of their name nor needed by one of those."""
    by_ref = {str(m.ref): m for m in manifests}
    names: dict[tuple[str, str], list[Manifest]] = {}
    for manifest in manifests:
        names.setdefault((manifest.kind, manifest.name), []).append(manifest)
    pending = [m for group in names.values() for m in sorted(group, key=lambda m: m.version)[-keep:]]
    needed: set[str] = set()
    while pending:
        manifest = pending.pop()
        if str(manifest.ref) not in needed:
            needed.add(str(manifest.ref))
            pending += _standing(by_ref, (record.ref for record in manifest.inputs.values()))
    return {m.ref for ref, m in by_ref.items() if ref not in needed}


def _standing(by_ref: dict[str, Manifest], refs: Iterable[str]) -> list[Manifest]:
    return [by_ref[ref] for ref in refs if ref in by_ref]


def _published(root: Path) -> list[Ref]:
    """Every artifact by the names of its folders, so that one with a damaged manifest is among them."""
    from configs.artifacts import MANIFEST, Ref

    return sorted(Ref.parse(path.parent.relative_to(root).as_posix()) for path in root.glob(f"[!.]*/*@*/{MANIFEST}"))


def _leftovers(root: Path) -> list[Path]:
    """What attempts that were killed before they published left beside the artifacts."""
    return sorted((root / ".staging").glob("*"))


def _bytes(manifest: Manifest) -> int:
    return sum(record.size_bytes for record in manifest.files)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
