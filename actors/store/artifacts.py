"""The artifact store: immutable, verified folders addressed by `kind/name@version`.

Publication is one rename of a folder whose manifest was written last, so an artifact is there whole or not at all.
Readers check every file's size and blake3 against the manifest. A published artifact is never changed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from configs.artifacts import (
    MANIFEST,
    FileRecord,
    Identity,
    InputRecord,
    Manifest,
    Ref,
    content_digest,
    hash_json,
)
from configs.errors import ArtifactError, CorruptArtifactError, StorageError

_STAGING = ".staging"
_MODEL_FILES = ("config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_PACKAGES = ("ganymede", "ray", "torch", "transformers", "mlflow", "pyarrow", "tokenizers", "gigatoken")


@dataclass(frozen=True)
class Artifact:
    """A published artifact on local storage."""

    manifest: Manifest
    path: Path

    @property
    def ref(self) -> Ref:
        """Its address."""
        return self.manifest.ref

    @property
    def digest(self) -> str:
        """Digest of its content."""
        return self.manifest.digest


class ArtifactStore:
    """Artifacts below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, ref: Ref) -> Path:
        """Where `ref` is, or would be."""
        return self.root / ref.kind / f"{ref.name}@{ref.version}"

    def get(self, ref: Ref | str, *, verify: bool = True) -> Artifact:
        """The artifact called `ref`.

        Args:
            verify: read every file and compare it with the manifest.

        Raises:
            ArtifactError: there is none.
            CorruptArtifactError: a file is missing, or its size or blake3 is not the manifest's.
        """
        ref = Ref.parse(ref) if isinstance(ref, str) else ref
        artifact = Artifact(self._manifest(ref), self.path(ref))
        if verify:
            verify_files(artifact)
        return artifact

    def find(self, kind: str, name: str, fingerprint: str) -> Artifact | None:
        """The newest version of `kind/name` made from this fingerprint, verified; None if there is none."""
        for version in sorted(self.versions(kind, name), reverse=True):
            ref = Ref(kind, name, version)
            if self._manifest(ref).fingerprint == fingerprint:
                return self.get(ref)
        return None

    def versions(self, kind: str, name: str) -> list[int]:
        """Published versions of `kind/name`, ascending."""
        return [m.version for m in self._walk(kind) if m.name == name]

    def list(self) -> list[Manifest]:
        """Every published artifact, by kind, name and version."""
        kinds = sorted(p.name for p in self.root.iterdir() if p.is_dir()) if self.root.is_dir() else []
        return [m for kind in kinds if not kind.startswith(".") for m in self._walk(kind)]

    def staging(self, ref: Ref, owner: str) -> Path:
        """An empty folder beside the artifacts for the files of `ref`.

        Args:
            owner: unique to this attempt. What earlier attempts at `ref` left is removed, so the caller must hold the
                lease; an attempt that lost it finds its folder gone.
        """
        prefix = f"{ref.kind}-{ref.name}@{ref.version}~"
        staging = self.root / _STAGING
        staging.mkdir(parents=True, exist_ok=True)
        for left in staging.glob(f"{prefix}*"):
            remove_tree(left)
        folder = staging / f"{prefix}{owner}"
        folder.mkdir()
        return folder

    def publish(
        self,
        folder: Path,
        *,
        ref: Ref,
        identity: Identity,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        summary: Mapping[str, Any],
        tracking_run: str | None,
        fence: Callable[[], None],
    ) -> Artifact:
        """Turns `folder` (from `staging`) into the artifact `ref`.

        Args:
            fence: called right before the rename; raises if the caller no longer holds the stage.

        Raises:
            StorageError: the folder holds no file, or storage refuses it.
            ArtifactError: `ref` stands already.
        """
        files = tuple(_record(folder, path) for path in _walk_files(folder))
        if not files:
            raise StorageError(f"nothing to publish for {ref}", next_step="report this: the stage wrote no file")
        manifest = Manifest(
            kind=ref.kind,
            name=ref.name,
            version=ref.version,
            digest=content_digest(ref.kind, files),
            fingerprint=identity.fingerprint,
            code_version=identity.code_version,
            config=dict(config),
            literals=dict(identity.literals),
            inputs={role: InputRecord(ref=str(a.ref), digest=a.digest) for role, a in inputs.items()},
            sources=dict(identity.sources),
            files=files,
            summary=dict(summary),
            packages=package_versions(),
            tracking_run=tracking_run,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        write_durably(folder / MANIFEST, manifest.model_dump_json(indent=2).encode())
        sync_folder(folder)
        target = self.path(ref)
        target.parent.mkdir(parents=True, exist_ok=True)
        fence()
        try:
            folder.rename(target)
        except OSError as error:
            if target.exists():
                raise ArtifactError(f"{ref} stands already", next_step="publish under another version") from error
            raise
        sync_folder(target.parent)
        return Artifact(manifest, target)

    def remove(self, ref: Ref) -> None:
        """Deletes an artifact, a damaged one too; it disappears at once, whole. Raises `ArtifactError` if it is not
        there."""
        folder = self.path(ref)
        if not folder.is_dir():
            raise ArtifactError(f"no artifact {ref} in {self.root}", next_step="ganymede artifacts list")
        doomed = self.root / _STAGING / f"removed-{ref.kind}-{ref.name}@{ref.version}"
        remove_tree(doomed)
        doomed.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(doomed)
        remove_tree(doomed)

    def _walk(self, kind: str) -> Iterator[Manifest]:
        folder = self.root / kind
        found = []
        for path in folder.iterdir() if folder.is_dir() else ():
            if (path / MANIFEST).is_file():
                name, _, version = path.name.rpartition("@")
                found.append(Ref(kind, name, int(version)))
        return (self._manifest(ref) for ref in sorted(found))

    def _manifest(self, ref: Ref) -> Manifest:
        path = self.path(ref) / MANIFEST
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            known = ", ".join(str(m.ref) for m in self.list()) or "the store is empty"
            raise ArtifactError(
                f"no artifact {ref} in {self.root}", allowed=known, next_step="ganymede artifacts list"
            ) from None
        try:
            manifest = Manifest.model_validate_json(text)
        except ValueError as error:
            raise _corrupt(ref, path, "the manifest does not parse") from error
        if manifest.ref != ref or manifest.digest != content_digest(manifest.kind, manifest.files):
            raise _corrupt(ref, path, "the manifest contradicts itself or its folder's name")
        return manifest


def verify_files(artifact: Artifact) -> None:
    """Compares every file of `artifact` with its manifest. Raises `CorruptArtifactError` at the first difference."""
    for record in artifact.manifest.files:
        path = artifact.path / record.path
        if not path.is_file():
            raise _corrupt(artifact.ref, path, "the file is missing")
        size = path.stat().st_size
        if size != record.size_bytes:
            raise _corrupt(artifact.ref, path, f"{size} bytes, the manifest says {record.size_bytes}")
        if file_blake3(path) != record.blake3:
            raise _corrupt(artifact.ref, path, "its blake3 is not the manifest's")


def _corrupt(ref: Ref, path: Path, why: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"artifact {ref} is damaged: {path}: {why}",
        next_step=f"ganymede artifacts gc --remove {ref}, then run the recipe again to remake it",
    )


def file_blake3(path: Path) -> str:
    """blake3 of a file's bytes, hex."""
    return blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).hexdigest()


def model_digest(folder: Path) -> str:
    """Digest of the files of a model folder that decide what it is.

    Raises:
        ArtifactError: there is no such folder, or no model in it.
    """
    found = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    if not {"config.json", "tokenizer.json"} <= {path.name for path in found}:
        raise ArtifactError(
            f"{folder} is no model folder",
            allowed="a folder in Hugging Face format, with config.json, tokenizer.json and *.safetensors",
            next_step="correct `from` in the recipe",
        )
    return hash_json([[path.name, file_blake3(path)] for path in found])


def _walk_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _record(folder: Path, path: Path) -> FileRecord:
    sync_file(path)
    return FileRecord(
        path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, blake3=file_blake3(path)
    )


def write_durably(path: Path, content: bytes) -> None:
    """Writes `content` under a temporary name, syncs, and renames: `path` holds all of it or what it held before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Forces a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # a folder is opened and synced the same way


def remove_tree(folder: Path) -> None:
    """Deletes a folder and all below it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose code decides content."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
