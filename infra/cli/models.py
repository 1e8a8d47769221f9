"""What a command's MODEL argument stands for: a folder, an artifact of the store, or an entry of the registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODEL_HELP = "NAME@ALIAS of the registry, model/NAME@VERSION, or a folder."


@dataclass(frozen=True)
class FoundModel:
    """A folder with a model, and which artifact it is unless the folder itself was named."""

    folder: Path
    ref: str | None
    digest: str | None

    @property
    def name(self) -> str:
        """The artifact, or the folder."""
        return self.ref or str(self.folder)


def find_model_folder(model: str, home: Path) -> FoundModel:
    """Resolves a MODEL argument.

    Raises:
        ArtifactError: there is no such folder, artifact or registered version.
        CorruptArtifactError: the artifact is not what was published.
        TrackingError: the registry cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return FoundModel(folder, None, None)
    from actors.store.artifacts import ArtifactStore
    from infra.served import find_model

    found = find_model(model, ArtifactStore(home / "artifacts"), home)
    return FoundModel(Path(found.folder), found.ref, found.digest)


def find_tokenizer_folder(reference: str, home: Path) -> FoundModel:
    """The same for whatever holds a tokenizer: `tokenizer/NAME@VERSION` too.

    Raises what `find_model_folder` does.
    """
    if not reference.startswith("tokenizer/") or Path(reference).expanduser().is_dir():
        return find_model_folder(reference, home)
    from actors.store.artifacts import ArtifactStore
    from configs.artifacts import Ref

    artifact = ArtifactStore(home / "artifacts").get(Ref.parse(reference))
    return FoundModel(artifact.path, str(artifact.ref), artifact.digest)
